"""The records of the families that run in our own decoder: what they make of published configurations."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oarlock.errors import ModelError
from oarlock.families.architecture import Architecture, LatentAttention, MoE
from oarlock.families.decoder_weights import count_parameters, count_used_parameters, list_full_names
from oarlock.families.registry import FAMILIES
from oarlock.model_config.load import make_config
from support.tiny_configs import TINY_CONFIGS


def architecture(family: str, **fields: Any) -> Architecture:
    return FAMILIES[family].decoder(make_config({"model_type": family, "transformers_version": "5", **fields}, "x"))


def test_used_parameters_count_the_chosen_experts_only():
    """Mixtral's 12.9 billion (https://arxiv.org/abs/2401.04088), without its embedding, which is looked up."""
    assert round(count_used_parameters(architecture("mixtral")) / 1e8) == 127


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_parameters_are_those_of_all_weights(name):
    found = architecture(TINY_CONFIGS[name]["model_type"], **TINY_CONFIGS[name])
    weights = dict(list_full_names(found))
    assert sum(math.prod(weight.shape) for weight in weights.values()) == count_parameters(found)
    assert all(key.startswith((f"{found.prefix}.", "lm_head.")) for key in weights)
    assert ("lm_head.weight" in weights) != found.tied


def test_every_family_has_a_tiny_configuration():
    own = {name for name, family in FAMILIES.items() if family.decoder is not None}
    assert own == {fields["model_type"] for fields in TINY_CONFIGS.values()}


def test_what_is_special_about_a_family():
    gemma2 = architecture("gemma2")
    assert gemma2.norm_offset == 1 and gemma2.embedding_scale == 2304**0.5 and gemma2.logit_soft_cap == 30
    assert [block.attention.window for block in gemma2.blocks[:2]] == [4096, None]
    gemma3 = architecture("gemma3_text")
    assert [block.attention.rope.theta for block in gemma3.blocks[4:6]] == [1e4, 1e6]
    glm4 = architecture("glm4").blocks[0].attention
    assert glm4.rope.dim == 64 and glm4.rope.interleaved and glm4.qkv_bias and not glm4.output_bias
    smollm3 = architecture("smollm3")
    assert [block.attention.rope is None for block in smollm3.blocks[:4]] == [False, False, False, True]
    granite = architecture("granite", logits_scaling=8.0, attention_multiplier=0.0078125, residual_multiplier=0.22)
    assert granite.logit_scale == 0.125 and granite.blocks[0].residual_scale == 0.22
    deepseek = architecture("deepseek_v3", rope_scaling={
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    })  # fmt: skip
    latent, moe = deepseek.blocks[3].attention, deepseek.blocks[3].mlp
    assert isinstance(latent, LatentAttention) and abs(latent.scale - 192**-0.5 * 1.3688879454113936**2) < 1e-12
    assert isinstance(moe, MoE) and (moe.groups, moe.top_groups, moe.weight_scale) == (8, 4, 2.5)
    assert not isinstance(deepseek.blocks[2].mlp, MoE)


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("smollm3", {"no_rope_layers": [1]}, "x: no_rope_layers has 1 entries, and the model 36 layers"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
        ("qwen3_moe", {"num_experts_per_tok": 200}, "num_experts_per_tok is 200, of 128 experts"),
        ("deepseek_v3", {"n_group": 7}, "256 experts in n_group 7 groups"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
        ("deepseek_v3", {"num_attention_heads": 128, "num_key_value_heads": 8}, "num_key_value_heads 8 is not num_attention_heads 128"),
        ("mixtral", {"num_local_experts": 4096, "num_hidden_layers": 4096}, "more than any published model"),
        ("gemma2", {"hidden_activation": "tanh"}, "hidden_activation is 'tanh'"),
        ("llama", {"alibi": True, "paddlenlp_version": "3"}, "x: alibi: models with ALiBi"),
        ("phi3", {"sliding_window": 0}, "x: sliding_window has to be above 0, or null; it is 0"),
        ("qwen3", {"sliding_window": 0, "use_sliding_window": True, "max_window_layers": 3}, "sliding_window has to be"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping has to be above 0"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping has to be above 0"),
        ("gemma3_text", {"sliding_window": None}, "x: sliding_window is null"),
        ("mixtral", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 16}, "layers of mixtral are of one kind"),
        ("phi3", {"sliding_window": 6, "layer_types": ["full_attention"] * 32}, "layers of phi3 are of one kind"),
        ("glm4", {"layer_types": ["sliding_attention"] * 40}, "layers of glm4 are of one kind"),
        ("granite", {"layer_types": ["chunked_attention"] * 32}, "layer_types: only full_attention and sliding_attention"),
        ("glm4", {"fuse_attention_qkv": True}, r"fuse_attention_qkv \(True\)"),
    ],
)  # fmt: skip
def test_what_the_decoder_does_not_compute_is_refused(family, fields, words):
    with pytest.raises(ModelError, match=words):
        make_config({"model_type": family, **fields}, "x")


def test_records_need_no_paddle():
    code = (
        "import sys\nfrom types import SimpleNamespace\nfrom oarlock.families.registry import FAMILIES\n"
        "for family in FAMILIES.values():\n"
        "    if family.own_config:\n"
        "        words = family.hf_config\n"
        "        rope = {'rope_theta': words.rope_theta, 'rope_scaling': None, 'num_experts_per_tok': 2}\n"
        "        fields = {**rope, **{k: v for k, v in words.fields.items() if v is not None or k not in rope}}\n"
        "        config = SimpleNamespace(model_type=family.name, **fields)\n"
        "        assert len(family.decoder(config).blocks) == config.num_hidden_layers\n"
        "assert not {'paddle', 'paddlenlp', 'numpy'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[3] / "llm", check=True, timeout=60
    )


def test_files_of_transformers_4_and_5_mean_the_same():
    old = architecture("qwen3", rope_theta=1e6, rope_scaling={"type": "yarn", "factor": 4.0})
    new = architecture("qwen3", rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0})
    assert old == new and old.blocks[0].attention.rope.kind == "yarn"
