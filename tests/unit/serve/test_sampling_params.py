"""Everything that is generated from the one declaration of the sampling parameters."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest

from oarlock.cli.commands.chat import ChatOptions
from oarlock.errors import RequestRefused
from oarlock.export.triton import _RELAY_MODULES
from oarlock.model_config.generation_config import read_sampling_defaults
from oarlock.sampling import params
from oarlock.sampling.markdown import describe_options, format_sampling_table
from oarlock.sampling.params import OPTIONS, SamplingParams
from oarlock.sampling.ranges import Range
from oarlock.serve.front.openai.schema import ChatRequest, CompletionRequest
from oarlock.serve.request import GenerationRequest, Prompt
from oarlock.serve.triton.fastdeploy_json import read_form
from oarlock.serve.triton.fields import read_request, write_request
from oarlock.triton_repository.config_pbtxt import make_template_config
from oarlock.triton_repository.inputs import INPUTS
from oarlock.triton_repository.model_code import PACKAGE

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_every_parameter_is_in_every_interface():
    for request in (ChatRequest, CompletionRequest):
        assert set(OPTIONS) < set(request.model_fields)
    for model in ("oarlock", "oarlock_infer"):
        assert set(OPTIONS) < {one.name for one in make_template_config(model).input}
    assert {name for name, option in OPTIONS.items() if option.in_chat} < {item.name for item in fields(ChatOptions)}
    assert all(describe_options().values())


def test_the_documented_table_matches_the_declaration():
    pages = [page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")]
    assert sum(format_sampling_table() in page for page in pages) == 1, "python -m oarlock.sampling.markdown prints it"


def test_one_line_adds_a_parameter(monkeypatch):
    """Everything generated from the declaration has it."""

    @dataclass(frozen=True)
    class More(SamplingParams):
        min_p: float = params.sampled(0.0, Range(0, 1), in_generation_config=True, in_chat=True)

    (item,) = [item for item in fields(More) if item.name == "min_p"]
    option = params._option(item, float)
    assert (option.kind, option.fastdeploy, option.openai_range.most) == (float, "min_p", 1)
    code = """
import ast, dataclasses, json, sys
from oarlock.sampling import params, ranges
source = open(params.__file__).read().replace(
    "    default_tokens: int | None =",
    "    min_p: float = sampled(0.0, Range(0, 1), in_generation_config=True, in_chat=True)\\n    default_tokens: int | None =", 1)
exec(compile(source, params.__file__, "exec"), params.__dict__)
from oarlock.cli.commands.chat import ChatOptions
from oarlock.model_config.generation_config import read_sampling_defaults
from oarlock.serve.front.openai.schema import ChatRequest
from oarlock.serve.triton.fastdeploy_json import read_form
from oarlock.triton_repository.config_pbtxt import make_template_config
body = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "hi"}], "min_p": 0.5})
(request,) = body.make_requests(1.0, None)
print(json.dumps({
    "openai": request.sampling.min_p,
    "triton": "min_p" in [one.name for one in make_template_config("oarlock").input],
    "fastdeploy": "min_p" in read_form(b'{"text": "x", "min_p": 0.5}')[0],
    "chat": "min_p" in [item.name for item in dataclasses.fields(ChatOptions)],
    "generation_config": read_sampling_defaults({"min_p": 0.25})["min_p"],
}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {
        "openai": 0.5,
        "triton": True,
        "fastdeploy": True,
        "chat": True,
        "generation_config": 0.25,
    }


REQUESTS = [
    GenerationRequest(Prompt(text="x"), SamplingParams(given=frozenset())),
    GenerationRequest(
        Prompt(messages=[{"role": "user", "content": "hi"}], tools=[{"type": "function"}], adapter="a"),
        SamplingParams(
            max_tokens=3, temperature=0.5, seed=-5, stop=("a", "b"), stop_token_ids=(7,), ignore_eos=True,
            given=frozenset({"max_tokens", "temperature", "seed", "stop", "stop_token_ids", "ignore_eos"}),
        ),
        stream=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("request_", REQUESTS, ids=["plain", "full"])
def test_a_request_is_the_same_behind_triton(request_):
    tensors = write_request(request_)
    assert set(tensors) <= set(INPUTS)
    found = read_request(tensors, 10_000)
    assert (found.prompt, found.stream) == (request_.prompt, request_.stream)
    assert found.sampling == request_.sampling


def test_a_number_that_triton_rounds_to_zero_is_refused():
    """Triton's tensors have 32 bits, and the engine trusts the check of the front."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "top_p": 1e-50}
    with pytest.raises(RequestRefused, match="top_p must be above 0"):
        ChatRequest.model_validate(body).make_requests(1.0, None)
    (request,) = ChatRequest.model_validate(body | {"top_p": 0.7}).make_requests(1.0, None)
    assert request.sampling.top_p == float(np.float32(0.7))
    assert read_form(b'{"text": "x", "topp": 0.7}')[0]["top_p"].tolist() == [request.sampling.top_p]


def test_generation_config_sets_declared_parameters():
    given = {"do_sample": True, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.5, "frequency_penalty": 1}
    assert read_sampling_defaults(given) == {"temperature": 1.0, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.5}


def test_the_repository_contains_all_imports_of_the_relaying_models():
    """They run where neither paddle nor pydantic need be installed."""
    for module in _RELAY_MODULES:
        for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("oarlock"):
                place = node.module.removeprefix("oarlock").replace(".", "/").lstrip("/")
                assert {f"{place}.py", f"{place}/__init__.py"} & set(_RELAY_MODULES), f"{module}: {node.module}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not {"paddle", "pydantic", "fastapi", "grpc"} & {name.split(".")[0] for name in names}, module
