"""Phi-3, Phi-3.5 and Phi-4."""

from __future__ import annotations

from typing import Any

from oarlock.families.architecture import Architecture
from oarlock.families.config_reading import make_blocks, read_architecture, read_attention, read_mlp, read_partial_rope
from oarlock.families.family import HFConfig
from oarlock.families.shared import make_decoder_family


def make_architecture(config: Any) -> Architecture:
    """Make the architecture of Phi-3, whose files have packed matrices."""
    attention = read_attention(config, read_partial_rope(config), window=config.sliding_window, packed="blocks")
    mlp = read_mlp(config, packed=True, names=("gate_up_proj", "", "down_proj"))
    return read_architecture(config, make_blocks([attention] * config.num_hidden_layers, mlp))


FAMILY = make_decoder_family(
    "phi3",
    "Phi3",
    HFConfig(
        fields={
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": False,
            "attention_dropout": 0.0,
            "original_max_position_embeddings": 4096,
            "sliding_window": None,
        },
        supported={"lm_head_bias": (False,)},
        ignored=frozenset({"interpolate_factor", "full_attn_mod"}),
        dropouts=frozenset({"resid_pdrop", "embd_pdrop"}),
        activation="hidden_act",
        scaled_rotary=frozenset({"longrope"}),
    ),
    make_architecture,
    lora_targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
)
