"""Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from oarlock.families.architecture import Architecture
from oarlock.families.config_reading import (
    make_blocks,
    read_architecture,
    read_attention,
    read_mlp,
    read_moe,
    read_partial_rope,
)
from oarlock.families.family import HFConfig
from oarlock.families.shared import make_decoder_family


def make_architecture(config: Any) -> Architecture:
    """Make the architecture of Qwen3-MoE: norms of queries and keys, and dense layers among the others."""
    window = config.sliding_window if config.use_sliding_window else None
    attention = read_attention(config, read_partial_rope(config), qk_norm="head", window=window)
    expert = read_mlp(config, config.moe_intermediate_size)
    moe = read_moe(config, config.num_experts, expert, renormalize=config.norm_topk_prob)
    dense = read_mlp(config)
    each = [
        dense if i in (config.mlp_only_layers or ()) or (i + 1) % config.decoder_sparse_step else moe
        for i in range(config.num_hidden_layers)
    ]
    return read_architecture(config, make_blocks([attention] * config.num_hidden_layers, each))


FAMILY = make_decoder_family(
    "qwen3_moe",
    "Qwen3Moe",
    HFConfig(
        fields={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": None,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": False,
            "attention_dropout": 0.0,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
            "norm_topk_prob": False,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "mlp_only_layers": None,
        },
        aliases={"num_local_experts": "num_experts"},
        ignored=frozenset({"max_window_layers"}),
        activation="hidden_act",
    ),
    make_architecture,
    hf_resplits_text=True,
)
