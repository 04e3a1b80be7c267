"""OLMo 2."""

from __future__ import annotations

from typing import Any

from oarlock.families.architecture import Architecture, Norms
from oarlock.families.config_reading import make_blocks, read_architecture, read_attention, read_mlp, read_partial_rope
from oarlock.families.family import HFConfig
from oarlock.families.shared import make_decoder_family


def make_architecture(config: Any) -> Architecture:
    """Make the architecture of OLMo 2: norms after both parts of a layer, and over all heads of queries and keys."""
    attention = read_attention(config, read_partial_rope(config), qk_norm="all_heads")
    norms = Norms(
        before_attention="",
        after_attention="post_attention_layernorm",
        before_mlp="",
        after_mlp="post_feedforward_layernorm",
    )
    blocks = make_blocks([attention] * config.num_hidden_layers, read_mlp(config), norms=norms)
    return read_architecture(config, blocks)


FAMILY = make_decoder_family(
    "olmo2",
    "Olmo2",
    HFConfig(
        fields={
            "vocab_size": 50304,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": False,
            "attention_dropout": 0.0,
            "attention_bias": False,
        },
        activation="hidden_act",
    ),
    make_architecture,
)
