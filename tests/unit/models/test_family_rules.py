"""Which families support which kinds of parallelism, and the sizes of their models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from oarlock.families.model_sizes import ModelSizes
from oarlock.families.registry import FAMILIES

# families


def test_tensor_parallel_support_matches_paddlenlp():
    transformers = Path(importlib.util.find_spec("paddlenlp").origin).parent / "transformers"
    for family, support in FAMILIES.items():
        if support.decoder is not None:
            assert support.tensor_parallel and support.pipeline and support.sequence_parallel, family
            continue
        source = (transformers / family / "modeling.py").read_text()
        assert support.tensor_parallel == ("ColumnParallelLinear(" in source and family != "opt"), (
            family
        )  # whose head is wrong
        assert support.sequence_parallel == ("config.sequence_parallel" in source), family
        assert support.pipeline == (transformers / family / "modeling_pp.py").exists(), family


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("Llama", {"num_key_value_heads": 8}, ModelSizes("llama", 32, 4096, 11008, 32, 8, 32000)),
        ("Qwen2", {"tie_word_embeddings": True}, ModelSizes("qwen2", 32, 4096, 22016, 32, 32, 151936, tied=True)),
        ("ChatGLMv2", {"multi_query_group_num": 2}, ModelSizes("chatglm_v2", 28, 4096, 13696, 32, 2, 65024)),
        ("ChatGLM", {}, ModelSizes("chatglm", 28, 4096, 16384, 32, 32, 130528, tied=True)),
        ("GLM", {}, ModelSizes("glm", 24, 1024, 4096, 16, 16, 30592, tied=True)),
        ("Bloom", {"n_layer": 6, "n_head": 4}, ModelSizes("bloom", 6, 64, 256, 4, 4, 250880, tied=True)),
        ("GPTJ", {"n_embd": 2048}, ModelSizes("gptj", 28, 2048, 8192, 16, 16, 50400)),
        ("OPT", {}, ModelSizes("opt", 24, 2048, 8192, 32, 32, 50272, tied=True)),
    ],
)
def test_model_sizes_are_read_from_every_family(name, options, expected):
    import paddlenlp.transformers as families

    assert ModelSizes.from_config(getattr(families, f"{name}Config")(**options)) == expected


def test_a_configuration_without_layers_is_an_error():
    with pytest.raises(ValueError, match="type x without num_hidden_layers"):
        ModelSizes.from_config(SimpleNamespace(model_type="x", hidden_size=8, num_attention_heads=2))
