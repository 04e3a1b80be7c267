"""Granite 3."""

from __future__ import annotations

from typing import Any

from oarlock.families.architecture import Architecture
from oarlock.families.config_reading import make_blocks, read_architecture, read_attention, read_mlp, read_partial_rope
from oarlock.families.family import HFConfig
from oarlock.families.shared import make_decoder_family


def make_architecture(config: Any) -> Architecture:
    """Make the architecture of Granite, which scales embeddings, scores, residuals and logits."""
    attention = read_attention(config, read_partial_rope(config), scale=config.attention_multiplier)
    blocks = make_blocks(
        [attention] * config.num_hidden_layers, read_mlp(config), residual_scale=config.residual_multiplier
    )
    scales = {"embedding_scale": config.embedding_multiplier, "logit_scale": 1 / config.logits_scaling}
    return read_architecture(config, blocks, **scales)


FAMILY = make_decoder_family(
    "granite",
    "Granite",
    HFConfig(
        fields={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": False,
            "attention_dropout": 0.0,
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        activation="hidden_act",
    ),
    make_architecture,
)
