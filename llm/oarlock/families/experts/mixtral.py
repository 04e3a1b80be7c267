"""Mixtral."""

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
from oarlock.families.shared import SPLIT_ATTENTION, make_decoder_family


def make_architecture(config: Any) -> Architecture:
    """Make the architecture of Mixtral."""
    attention = read_attention(config, read_partial_rope(config), window=config.sliding_window)
    moe = read_moe(config, config.num_local_experts, read_mlp(config, names=("w1", "w3", "w2")))
    blocks = make_blocks([attention] * config.num_hidden_layers, moe, mlp_name="block_sparse_moe")
    return read_architecture(config, blocks)


FAMILY = make_decoder_family(
    "mixtral",
    "Mixtral",
    HFConfig(
        fields={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": None,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": False,
            "attention_dropout": 0.0,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        },
        aliases={"num_experts": "num_local_experts"},
        supported={"router_jitter_noise": (0.0,)},
        activation="hidden_act",
        rope_theta=1e6,
    ),
    make_architecture,
    lora_targets=(*SPLIT_ATTENTION, "w1", "w2", "w3"),
)
