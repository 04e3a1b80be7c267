"""Fields of rotary embeddings, between Hugging Face's two forms, PaddleNLP's and ours; and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oarlock.errors import ModelError
from oarlock.families.family import HFConfig
from oarlock.families.rope import SCALED_ROTARY, read_rope
from oarlock.model_config.hf_rope import convert_rope_from_hf, convert_rope_to_hf, read_rope_fields

LENGTH = "original_max_position_embeddings"
NUMBERS, POSITIONS = st.floats(1.1, 64), st.integers(2, 4096)
FACTORS = st.lists(NUMBERS, min_size=4, max_size=4)
SCALINGS = {
    "linear": st.fixed_dictionaries({"factor": NUMBERS}),
    "dynamic": st.fixed_dictionaries({"factor": NUMBERS}),
    "llama3": st.fixed_dictionaries(
        {"factor": NUMBERS, "low_freq_factor": st.floats(0.1, 1), "high_freq_factor": NUMBERS, LENGTH: POSITIONS}
    ),
    "yarn": st.fixed_dictionaries(
        {"factor": NUMBERS},
        optional={
            LENGTH: POSITIONS, "attention_factor": NUMBERS, "beta_fast": st.floats(2, 64),
            "beta_slow": st.floats(0.1, 1.5), "mscale": st.just(0) | NUMBERS, "mscale_all_dim": NUMBERS,
            "truncate": st.booleans(),
        },
    ),
    "longrope": st.fixed_dictionaries(
        {"short_factor": FACTORS, "long_factor": FACTORS},
        optional={LENGTH: POSITIONS, "factor": NUMBERS, "attention_factor": NUMBERS},
    ),
}  # fmt: skip
PADDLE_KINDS = SCALED_ROTARY | {"ntk"}


def config_of(fields: dict[str, Any]) -> Any:
    return SimpleNamespace(model_type="llama", max_position_embeddings=64, **fields)


@given(st.data(), st.sampled_from(["default", *SCALINGS]), st.floats(2, 1e7), st.booleans(), st.booleans())
def test_round_trip(data, kind, theta, is_new, is_paddles):
    scaling = {} if kind == "default" else {"rope_type": kind, **data.draw(SCALINGS[kind])}
    content = (
        {"rope_parameters": {"rope_theta": theta, **scaling}}
        if is_new
        else {"rope_theta": theta, "rope_scaling": scaling}
    )
    kinds = PADDLE_KINDS if is_paddles else SCALED_ROTARY
    here = convert_rope_from_hf(content, kinds, "x")
    assert ("rope_scaling_type" in here) == (is_paddles and kind in ("linear", "dynamic"))
    there = convert_rope_to_hf(config_of(here), kinds, 8)
    assert there == {"rope_theta": theta, "rope_scaling": scaling or None}
    ours = read_rope_fields(content, HFConfig({}), "x")
    assert ours == {"partial_rotary_factor": None, **{k: v for k, v in there.items() if v is not None}}
    found = read_rope(config_of(here), 8)
    assert found == read_rope(config_of(ours), 8)
    assert (found.kind, found.theta) == (kind, theta) and {"rope_type": kind, **found.scaling} == scaling | {
        "rope_type": kind
    }


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "linear"}, "type linear lacks factor"),
        ({"rope_type": "llama3", "factor": 8.0, LENGTH: 64}, "lacks low_freq_factor, high_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4}, "lacks long_factor"),
        ({"rope_type": "yarn", "factor": 2.0, "beta": 3}, "does not know beta in rope_scaling of type 'yarn'"),
        ({"rope_type": "linear", "factor": 2.0, "mscale": 1.0}, "does not know mscale"),
        ({"rope_type": "proportional", "factor": 2.0}, "type 'proportional' .it knows: dynamic, linear, llama3"),
        ({"rope_type": "ntk", "factor": 2.0}, "does not know rope_scaling of type 'ntk'"),
        ({"rope_type": "linear", "factor": math.nan}, "factor has to be a number from 1e-06 to 1e.12; it is nan"),
        ({"rope_type": "yarn", "factor": math.inf}, "it is inf"),
        ({"rope_type": "yarn", "factor": 10**400}, "factor has to be a number"),
        ({"rope_type": "yarn", "factor": True}, "it is True"),
        ({"rope_type": "yarn", "factor": "2"}, "it is '2'"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate has to be true or false"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0}, "beta_fast has to be above beta_slow"),
        ({"rope_type": "yarn", "factor": 2.0, LENGTH: 1}, f"{LENGTH} has to be above 1"),
        ({"rope_type": "longrope", "short_factor": 1.0, "long_factor": [1.0]}, "short_factor has to be a list"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [0.0]}, "a number of long_factor has to be"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": ["a"]}, "a number of long_factor has to be"),
    ],
)
def test_what_is_refused(scaling, words):
    for content in ({"rope_scaling": scaling}, {"rope_parameters": scaling}):
        with pytest.raises(ModelError, match=words):
            convert_rope_from_hf(content, SCALED_ROTARY, "x")
        with pytest.raises(ModelError, match=words):
            read_rope_fields(content, HFConfig({}), "x")


@pytest.mark.parametrize(
    ("fields", "dim", "words"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 4}}, 8, "short_factor has 3 numbers; 4 freq"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_scaling_type": "linear"}, 8, "keep one of them"),
        ({"rope_scaling_type": "longer", "rope_scaling_factor": 2.0}, 8, "rope_scaling of type 'longer'"),
        ({"rope_scaling_type": "ntk", "rope_scaling_factor": 2.0}, 2, "2 components of a head can't be rotated"),
        ({"rope_theta": 1.0}, 8, "rope_theta has to be above 1"),
        ({}, 7, "7 components"),
    ],
)  # fmt: skip
def test_what_a_model_can_not_have(fields, dim, words):
    with pytest.raises(ModelError, match=words):
        read_rope(config_of(fields), dim)


def test_gemma_3_has_another_base_in_sliding_layers():
    words = HFConfig({}, rope_theta=1e6, local_theta="rope_local_base_freq")
    linear = {"rope_type": "linear", "factor": 8.0}
    nested = {
        "full_attention": {"rope_theta": 5e5, **linear},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    old = {"rope_theta": 5e5, "rope_scaling": linear, "rope_local_base_freq": 2e4}
    found = read_rope_fields({"rope_parameters": nested}, words, "x")
    assert found == {"partial_rotary_factor": None, **old}
    assert found == {"rope_local_base_freq": 2e4, **read_rope_fields(old, words, "x")}
    assert read_rope_fields({}, words, "x")["rope_theta"] == 1e6
    for wrong, why in (
        ({"rope_parameters": {"sliding_attention": linear}}, "no scaled rotary embeddings in its sliding layers"),
        ({"rope_parameters": nested, "rope_local_base_freq": 3e4}, "say different things"),
        ({"rope_parameters": nested, "rope_theta": 3e4}, "rope_theta is 30000.0, and 500000.0 among"),
        ({"rope_parameters": {"chunked_attention": {}}}, "has to have full_attention and sliding_attention"),
    ):
        with pytest.raises(ModelError, match=why):
            read_rope_fields(wrong, words, "x")


def test_phi_3s_names_and_its_length_beside_the_scaling():
    words = HFConfig({LENGTH: 4096}, scaled_rotary=frozenset({"longrope"}))
    lists = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    wanted = {"rope_type": "longrope", **lists, LENGTH: 32}
    for kind in ("su", "yarn", "longrope"):
        found = read_rope_fields({"rope_scaling": {"type": kind, **lists}, LENGTH: 32}, words, "x")
        assert found["rope_scaling"] == wanted
    assert read_rope_fields({"rope_scaling": {"type": "su", **lists}}, words, "x")["rope_scaling"][LENGTH] == 4096
    with pytest.raises(ModelError, match=r"is 32, and 64 in rope_scaling"):
        read_rope_fields({"rope_scaling": {"type": "su", **lists, LENGTH: 64}, LENGTH: 32}, words, "x")
    with pytest.raises(ModelError, match=r"type 'yarn' \(it knows: longrope\)"):
        read_rope_fields({"rope_scaling": {"type": "yarn", "factor": 2.0}}, words, "x")


def test_a_part_of_each_head():
    words = HFConfig({}, partial_rotary_factor=0.5)
    assert read_rope_fields({}, words, "x")["partial_rotary_factor"] == 0.5
    assert read_rope_fields({"rope_parameters": {"partial_rotary_factor": 0.25}}, words, "x") == {
        "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
    }  # fmt: skip
    for wrong in ({"partial_rotary_factor": 1.5}, {"rope_parameters": {"partial_rotary_factor": 0}}):
        with pytest.raises(ModelError, match="partial_rotary_factor has to be"):
            read_rope_fields(wrong, words, "x")
    with pytest.raises(ModelError, match="no partial_rotary_factor"):
        convert_rope_from_hf({"partial_rotary_factor": 0.5}, SCALED_ROTARY, "x")
