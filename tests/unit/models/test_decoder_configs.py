"""Configurations of our own: written in transformers' form, and read again as the same model."""

from __future__ import annotations

import json

import pytest

from oarlock.families.registry import FAMILIES
from oarlock.model_config.decoder_config import DecoderConfig
from oarlock.model_config.hf_config import to_hugging_face
from oarlock.model_config.load import find_config_class, make_config, read_config
from oarlock.weights.save import save_config
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
