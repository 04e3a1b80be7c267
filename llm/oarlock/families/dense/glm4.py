"""GLM-4 as of 0414 (the model_type glm4 of transformers)."""

from __future__ import annotations

from typing import Any

from oarlock.families.architecture import Architecture, Norms
from oarlock.families.config_reading import make_blocks, read_architecture, read_attention, read_mlp, read_partial_rope
from oarlock.families.family import HFConfig
from oarlock.families.shared import SPLIT_ATTENTION, make_decoder_family


def make_architecture(config: Any) -> Architecture:
    """Make the architecture of GLM-4: norms around both parts of a layer, half of each head rotated in pairs."""
    attention = read_attention(config, read_partial_rope(config, interleaved=True), output_bias=False)
    mlp = read_mlp(config, packed=True, names=("gate_up_proj", "", "down_proj"))
    norms = Norms(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
    return read_architecture(config, make_blocks([attention] * config.num_hidden_layers, mlp, norms=norms))


FAMILY = make_decoder_family(
    "glm4",
    "Glm4",
    HFConfig(
        fields={
            "vocab_size": 151552,
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "initializer_range": 0.02,
            "rms_norm_eps": 1.5625e-07,
            "tie_word_embeddings": False,
            "attention_dropout": 0.0,
            "attention_bias": True,
        },
        activation="hidden_act",
        partial_rotary_factor=0.5,
    ),
    make_architecture,
    lora_targets=(*SPLIT_ATTENTION, "gate_up_proj", "down_proj"),
)
