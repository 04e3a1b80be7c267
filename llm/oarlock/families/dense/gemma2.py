"""Gemma 2."""

from __future__ import annotations

from typing import Any

from oarlock.families.architecture import Architecture
from oarlock.families.config_reading import (
    SANDWICH_NORMS,
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
    """Make the architecture of Gemma 2: soft caps, and every second layer has a window."""
    windows, rope = read_windows(config, lambda i: i % 2 == 0), read_partial_rope(config)
    attentions = [
        read_attention(
            config,
            rope,
            scale=config.query_pre_attn_scalar**-0.5,
            soft_cap=config.attn_logit_softcapping,
            window=window,
        )
        for window in windows
    ]
    mlp = read_mlp(config, activation=config.hidden_activation)
    return read_architecture(
        config,
        make_blocks(attentions, mlp, norms=SANDWICH_NORMS),
        norm_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
        logit_soft_cap=config.final_logit_softcapping,
    )


FAMILY = make_decoder_family(
    "gemma2",
    "Gemma2",
    HFConfig(
        fields={
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": True,
            "attention_dropout": 0.0,
            "attention_bias": False,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "layer_types": None,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        supported={"use_bidirectional_attention": (None, False)},
        ignored=frozenset({"hidden_act", "cache_implementation", "sliding_window_size"}),
        activation="hidden_activation",
    ),
    make_architecture,
)
