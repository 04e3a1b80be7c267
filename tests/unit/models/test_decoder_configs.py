"""Configurations of our own: written in transformers' form, and read again as the same model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from oarlock.errors import ModelError
from oarlock.export.checks.config import check_config
from oarlock.families.decoder_weights import count_parameters
from oarlock.families.registry import FAMILIES
from oarlock.model_config.decoder_config import DecoderConfig
from oarlock.model_config.hf_config import to_hugging_face
from oarlock.model_config.load import find_config_class, find_model_class, make_config, read_config
from oarlock.models.build import ModelSource, build_model
from oarlock.weights.save import save_config
from oarlock.weights.weight_folder import WeightFolder
from support.tiny_configs import TINY_CONFIGS

OWN = [name for name, fields in TINY_CONFIGS.items() if FAMILIES[fields["model_type"]].own_config]
# What transformers writes besides the fields of a model.
NOTES = {"architectures", "model_type", "dtype", "use_cache"}


def architecture(config):
    return FAMILIES[config.model_type].decoder(config)


@pytest.mark.parametrize("name", OWN)
def test_a_configuration_that_is_written_is_read_again(name, tmp_path):
    config = make_config(TINY_CONFIGS[name], "x")
    save_config(config, tmp_path, "bfloat16")
    content = json.loads((tmp_path / "config.json").read_text())
    words = FAMILIES[config.model_type].hf_config
    tokens, rope = (
        {"bos_token_id", "eos_token_id", "pad_token_id"},
        {"rope_theta", "rope_scaling", "partial_rotary_factor"},
    )
    assert set(content) <= {*words.fields, *words.supported, *tokens, *rope, *NOTES}
    assert content["dtype"] == "bfloat16" and content["architectures"] == [FAMILIES[config.model_type].architecture]
    again = read_config(tmp_path)
    assert type(again) is type(config) and architecture(again) == architecture(config)
    assert again.dtype == "bfloat16" and again.pad_token_id == again.eos_token_id == 0
    save_config(again, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == content


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_configuration_that_is_exported_is_read_again(name):
    config = make_config(TINY_CONFIGS[name], "x")
    content = to_hugging_face(config, "float32", "x")
    assert architecture(make_config(content, "x")) == architecture(config)


def test_classes_are_made_once_and_named_as_in_transformers():
    made = find_config_class("qwen3")
    assert made is find_config_class("qwen3") and made.__name__ == "Qwen3Config" and issubclass(made, DecoderConfig)
    config = made(hidden_size=64, tensor_parallel_degree=2)
    assert (config.hidden_size, config.head_dim, config.model_type) == (64, 128, "qwen3")
    assert config.tensor_parallel_degree == 2 and not config.tie_word_embeddings
    assert "tensor_parallel_degree" not in config.to_diff_dict()


def test_defaults_are_not_shared_between_configurations():
    first, second = (find_config_class("qwen3_moe")() for _ in range(2))
    first.mlp_only_layers = [0]
    assert second.mlp_only_layers is None


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_the_checker_of_exports_accepts_what_is_written(name):
    content = to_hugging_face(make_config(TINY_CONFIGS[name], "x"), "float32", "x")
    assert not [finding for server in ("hf", "vllm") for finding in check_config(content, server)]


# the layout of weights whose names are the same in both


WEIGHTS = {"model.embed_tokens.weight": (64, 8), "model.layers.0.mlp.gate_proj.weight": (16, 8)}
TURNED = {"model.embed_tokens.weight": (64, 8), "model.layers.0.mlp.gate_proj.weight": (8, 16)}
SQUARE = {"model.embed_tokens.weight": (64, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8), "model.layers.0.self_attn.o_proj.weight": (8, 8)}  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "metadata", "expected"),
    [
        (WEIGHTS, {"format": "pt"}, "pt"),
        (WEIGHTS, {}, "pt"),
        (TURNED, {"format": "np"}, "np"),
        (TURNED, {}, "np"),
        (SQUARE, {"format": "np"}, "np"),
        (SQUARE, {"format": "pt"}, "pt"),
        (SQUARE, {}, r"it is unknown whether its matrices are \[in, out\] or \[out, in\]"),
        (WEIGHTS, {"format": "np"}, "format 'np', and its tensors have names or shapes of the other layout"),
        (TURNED, {"format": "pt"}, "format 'pt', and its tensors have names or shapes of the other layout"),
    ],
)
def test_the_layout_is_told_by_the_header_then_by_shapes(tmp_path, shapes, metadata, expected):
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata or None)
    if len(expected) == 2:
        assert WeightFolder.open(tmp_path).layout == expected
        return
    with pytest.raises(ModelError, match=expected):
        WeightFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("family", "fields"), [("deepseek_v3", {"first_k_dense_replace": 9}), ("qwen3_moe", {"decoder_sparse_step": 9})]
)
def test_models_of_dense_layers_need_no_experts(tmp_path, family, fields):
    config = make_config({**TINY_CONFIGS[family], **fields}, "x")
    model = find_model_class(config)(config)
    save_config(config, tmp_path)
    save_file({name: value.numpy() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    again = build_model(ModelSource(tmp_path, read_config(tmp_path), from_weights=True))
    assert sum(value.size for value in again.parameters()) == count_parameters(architecture(config))
