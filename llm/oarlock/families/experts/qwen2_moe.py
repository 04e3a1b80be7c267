"""Qwen1.5-MoE and Qwen2-MoE."""

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
    read_windows,
)
from oarlock.families.family import HFConfig
from oarlock.families.shared import make_decoder_family


def make_architecture(config: Any) -> Architecture:
    """Make the architecture of Qwen2-MoE: a shared expert with a gate, and dense layers among the others."""
    windows = read_windows(config, lambda i: i % 2 == 0 and i < config.max_window_layers)
    rope, biases = read_partial_rope(config), {"qkv_bias": config.qkv_bias, "output_bias": False}
    attentions = [read_attention(config, rope, window=window, **biases) for window in windows]
    moe = read_moe(
        config,
        config.num_experts,
        read_mlp(config, config.moe_intermediate_size),
        renormalize=config.norm_topk_prob,
        shared=read_mlp(config, config.shared_expert_intermediate_size),
        shared_gate=True,
        names=("gate", "shared_expert"),
    )
    dense = read_mlp(config)
    each = [
        dense if i in (config.mlp_only_layers or ()) or (i + 1) % config.decoder_sparse_step else moe
        for i in range(config.num_hidden_layers)
    ]
    return read_architecture(config, make_blocks(attentions, each))


FAMILY = make_decoder_family(
    "qwen2_moe",
    "Qwen2Moe",
    HFConfig(
        fields={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": None,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": False,
            "attention_dropout": 0.0,
            "qkv_bias": True,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "layer_types": None,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "num_experts": 60,
            "norm_topk_prob": False,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "mlp_only_layers": None,
        },
        aliases={"num_local_experts": "num_experts"},
        activation="hidden_act",
    ),
    make_architecture,
    hf_resplits_text=True,
)
