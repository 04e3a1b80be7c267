"""Gemma 3, text only."""

from __future__ import annotations

from typing import Any

from oarlock.errors import ModelError
from oarlock.families.architecture import Architecture, Rope
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
    """Make the architecture of Gemma 3: qk norms, and layers with a window rotate by another base.

    Raises:
        ModelError: for sliding layers without a window.
    """
    if config.sliding_window is None:
        raise ModelError("sliding_window is null, but the sliding layers of gemma3_text need one")
    windows = read_windows(config, lambda i: (i + 1) % config.sliding_window_pattern != 0)
    rope = read_partial_rope(config)
    local = Rope(config.rope_local_base_freq, rope.dim, rope.max_positions)
    attentions = [
        read_attention(
            config,
            rope if window is None else local,
            scale=config.query_pre_attn_scalar**-0.5,
            qk_norm="head",
            window=window,
        )
        for window in windows
    ]
    mlp = read_mlp(config)
    return read_architecture(
        config,
        make_blocks(attentions, mlp, norms=SANDWICH_NORMS),
        norm_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
        logit_soft_cap=config.final_logit_softcapping,
    )


FAMILY = make_decoder_family(
    "gemma3_text",
    "Gemma3",
    HFConfig(
        fields={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131072,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": True,
            "attention_dropout": 0.0,
            "attention_bias": False,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "layer_types": None,
            "final_logit_softcapping": None,
            "rope_local_base_freq": 10000.0,
        },
        supported={"use_bidirectional_attention": (None, False), "attn_logit_softcapping": (None,)},
        ignored=frozenset({"hidden_act", "cache_implementation", "sliding_window_size"}),
        activation="hidden_activation",
        rope_theta=1e6,
        local_theta="rope_local_base_freq",
    ),
    make_architecture,
)
