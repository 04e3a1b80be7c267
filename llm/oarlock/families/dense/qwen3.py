"""Qwen3."""

from __future__ import annotations

from typing import Any

from oarlock.families.architecture import Architecture
from oarlock.families.config_reading import (
    make_blocks,
    read_architecture,
    read_attention,
    read_mlp,
    read_partial_rope,
    read_windows,
)
from oarlock.families.family import HFConfig
from oarlock.families.shared import make_decoder_family


def make_architecture(config: Any) -> Architecture:
    """Make the architecture of Qwen3, which has norms of queries and keys."""
    windows, rope = read_windows(config, lambda i: i >= config.max_window_layers), read_partial_rope(config)
    attentions = [read_attention(config, rope, qk_norm="head", window=window) for window in windows]
    return read_architecture(config, make_blocks(attentions, read_mlp(config)))


FAMILY = make_decoder_family(
    "qwen3",
    "Qwen3",
    HFConfig(
        fields={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": False,
            "attention_dropout": 0.0,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "layer_types": None,
        },
        activation="hidden_act",
    ),
    make_architecture,
    hf_resplits_text=True,
)
