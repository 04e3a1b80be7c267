"""Fields of requests to the Triton models, and settings of the server, without a server."""

from __future__ import annotations

import json

import numpy as np
import pytest

from oarlock.errors import ConfigError, RequestRefused
from oarlock.serve.config import EngineConfig
from oarlock.serve.triton.fastdeploy_json import read_form, use_form_names
from oarlock.serve.triton.fields import make_tensor, read_request

HI = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def read_form_request(form):
    """The streaming model's request made from a JSON form."""
    tensors, _ = read_form(json.dumps(form).encode())
    return read_request(tensors, 10_000)


def test_the_json_form_with_empty_fields():
    empty = {
        "topp": None,
        "max_dec_len": None,
        "seed": None,
        "stop": [],
        "eos_token_ids": [],
        "tools": [],
        "adapter": None,
    }
    found = read_form_request({"text": "x", **empty})
    assert (found.prompt.text, found.sampling.max_tokens, found.sampling.stop) == ("x", None, ())
    assert found.prompt.tools is None and found.prompt.adapter is None


def test_numbers_out_of_range_are_refused():
    for form in (
        {"max_dec_len": 99_999_999_999},
        {"eos_token_ids": [5, 2**31]},
        {"seed": 2**63},
        {"topk": -(2**31) - 1},
    ):
        (name,) = form
        with pytest.raises(RequestRefused, match=f"^{name}: .* does not fit a number of"):
            read_form(json.dumps({"text": "x", **form}).encode())
    assert read_form_request({"text": "x", "max_dec_len": 2**31 - 1, "seed": -(2**63)}).sampling.seed == -(2**63)
    with pytest.raises(RequestRefused, match="temperature must be a finite number"):
        read_form_request({"text": "x", "temperature": 1e300}).sampling.check()


def test_the_json_form_with_messages_and_tools():
    found = read_form_request({"messages": HI, "tools": TOOLS, "stop": ["<|x|>"]})
    assert (found.prompt.messages, found.prompt.tools, found.sampling.stop) == (HI, TOOLS, ("<|x|>",))
    with pytest.raises(RequestRefused, match="tools go with messages"):
        read_form_request({"text": "x", "tools": TOOLS}).prompt.check()


def test_refusals_name_the_fields_of_the_json_form():
    said = "max_tokens 9 is too many; give one of text_input, messages and input_ids"
    assert use_form_names(said) == "max_dec_len 9 is too many; give one of text, messages and input_ids"


def test_a_default_length_counts_as_omitted():
    sampling = read_request({"text_input": make_tensor("text_input", ["x"])}, 100, 16).sampling
    assert (sampling.max_tokens, sampling.default_tokens) == (None, 16)
    sampling.check()


def test_tools_are_json():
    text = {"chat": np.array([True]), "text_input": make_tensor("text_input", ["x"])}
    found = read_request(text | {"tools": make_tensor("tools", [json.dumps(TOOLS)])}, 1000)
    assert found.prompt.messages == [{"role": "user", "content": "x"}] and found.prompt.tools == TOOLS
    with pytest.raises(RequestRefused, match="tools: not JSON"):
        read_request(text | {"tools": make_tensor("tools", ["["])}, 1000)


def test_the_option_parse_special_tokens():
    assert EngineConfig.from_parameters({}, {}).parse_special_tokens == "prompts"
    found = EngineConfig.from_parameters(
        {"parse_special_tokens": "none", "timeout": "2"}, {"parse_special_tokens": "all"}
    )
    assert (found.parse_special_tokens, found.timeout) == ("all", 2.0)
    with pytest.raises(ConfigError, match="--parse-special-tokens some: it must be one of prompts, all, none"):
        EngineConfig.from_parameters({"parse_special_tokens": "some"}, {})
