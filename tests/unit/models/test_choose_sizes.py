"""The sizes of new models: in the proportions of published ones, and as many parameters as asked."""

from __future__ import annotations

import pytest

from oarlock.cli.commands.model import read_count
from oarlock.errors import ConfigError, ModelError
from oarlock.families.decoder_weights import count_parameters
from oarlock.families.published_sizes import read_published_sizes
from oarlock.families.registry import FAMILIES, find_hf_config
from oarlock.model_config.choose_sizes import SizeRequest, choose_sizes
from oarlock.model_config.load import make_config

PUBLISHED = [(family, model) for family, models in read_published_sizes().items() for model in models]
SIZES = [("100M", 100_000_000), ("1.5B", 1_500_000_000), ("7B", 7_000_000_000)]


def test_every_family_of_our_decoder_has_published_sizes():
    assert set(read_published_sizes()) == {name for name, family in FAMILIES.items() if family.decoder is not None}


@pytest.mark.parametrize(("family", "model"), PUBLISHED, ids=[model.name for _, model in PUBLISHED])
def test_published_models_have_as_many_parameters_as_published(family, model):
    config = make_config({"model_type": family, **find_hf_config(family).fields, **model.fields}, model.name)
    decoder = FAMILIES[family].decoder
    assert decoder is not None
    if model.parameters is not None:
        assert count_parameters(decoder(config)) == model.parameters


@pytest.mark.parametrize("parameters", [size for _, size in SIZES], ids=[name for name, _ in SIZES])
@pytest.mark.parametrize("family", read_published_sizes())
def test_models_have_about_the_parameters_asked_and_can_be_split(family, parameters):
    chosen = choose_sizes(SizeRequest(family, parameters, vocab=32000))
    config, decoder = chosen.config, FAMILIES[family].decoder
    assert decoder is not None
    architecture = decoder(config)
    assert chosen.parameters == count_parameters(architecture)
    assert chosen.parameters == pytest.approx(parameters, rel=0.02)
    assert architecture.vocab == 32000 and architecture.max_positions == 4096
    assert config.num_attention_heads % 4 == 0 and config.num_key_value_heads % 4 == 0
    assert config.hidden_size % 8 == 0 and config.intermediate_size % 8 == 0
    nearest = next(model.fields for own, model in PUBLISHED if own == family and model.name == chosen.like)
    for name in ("rms_norm_eps", "rope_theta"):
        if name in nearest:
            assert getattr(config, name) == nearest[name]


def test_published_sizes_come_back():
    chosen = choose_sizes(SizeRequest("qwen3", 596_049_920, vocab=151936)).config
    assert (chosen.num_hidden_layers, chosen.hidden_size, chosen.intermediate_size) == (28, 1024, 3072)
    assert (chosen.num_attention_heads, chosen.num_key_value_heads, chosen.head_dim) == (16, 8, 128)
    assert chosen.tie_word_embeddings


def test_models_between_two_published_ones_have_proportions_between_theirs():
    chosen = choose_sizes(SizeRequest("llama", 2_000_000_000, vocab=128256)).config  # Llama 3.2 has 1B and 3B
    assert 16 <= chosen.num_hidden_layers <= 28 and 2048 <= chosen.hidden_size <= 3072
    assert 8192 / 3072 * 0.8 <= chosen.intermediate_size / chosen.hidden_size <= 8192 / 2048 * 1.25


def test_given_sizes_are_kept():
    given = {"layers": 6, "hidden": 256, "heads": 8, "kv_heads": 2, "head_dim": 48, "tied": False, "max_length": 512}
    config = choose_sizes(SizeRequest("qwen3", 8_000_000, vocab=4096, **given)).config
    found = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    assert found == (6, 256, 8, 2)
    assert (config.head_dim, config.tie_word_embeddings, config.max_position_embeddings) == (48, False, 512)
    experts = choose_sizes(SizeRequest("qwen3_moe", 20_000_000, vocab=4096, experts=8, top_k=2, intermediate=96)).config
    assert (experts.num_experts, experts.num_experts_per_tok, experts.moe_intermediate_size) == (8, 2, 96)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (SizeRequest("qwen3", 100_000), "too few: with these flags, the smallest qwen3 model has 1,"),
        (SizeRequest("opt", 100_000_000), "no published sizes to follow; choose one of llama"),
        (SizeRequest("qwen3", 100_000_000, experts=8), "qwen3 models have no experts"),
        (SizeRequest("deepseek_v2", 100_000_000, kv_heads=8), "has keys of its own"),
        (SizeRequest("qwen3", 10**9, vocab=1000, layers=2, hidden=64, intermediate=64), "the nearest qwen3 model has"),
        (SizeRequest("llama", 10**8, vocab=1000, hidden=500, heads=8), "can't be divided into 8 heads"),
    ],
)
def test_what_cannot_be_is_refused(request_, sentence):
    with pytest.raises(ConfigError, match=sentence):
        choose_sizes(request_)


def test_sizes_that_do_not_fit_together_are_refused():
    with pytest.raises(ModelError, match="can't share the keys of 3"):
        choose_sizes(SizeRequest("qwen3", 10**8, vocab=1000, heads=8, kv_heads=3))
    with pytest.raises(ModelError, match="not supported"):
        choose_sizes(SizeRequest("qwen99", 10**8))


def test_numbers_of_parameters_are_read():
    found = [read_count(text) for text in ("350000", "100M", "1.5B", "1.5 b", "350k", "1,000", "0.5T")]
    assert found == [350_000, 100_000_000, 1_500_000_000, 1_500_000_000, 350_000, 1_000, 500_000_000_000]
    for text in ("", "M", "1.5X", "-3M", "0", "1e9", "900T"):
        with pytest.raises(ConfigError, match="expected a number of parameters"):
            read_count(text)
