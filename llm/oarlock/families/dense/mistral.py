"""Mistral."""

from __future__ import annotations

from typing import Any

from oarlock.families.architecture import Architecture
from oarlock.families.config_reading import make_blocks, read_architecture, read_attention, read_mlp, read_partial_rope
from oarlock.families.family import Family, FusedDecoderSpec, HFConfig, Packing
from oarlock.families.shared import BATCH_FIRST, GATED_MLP, HF_SERVERS, SPLIT_ATTENTION, UNSCALED_ROTARY


def make_architecture(config: Any) -> Architecture:
    """Make the architecture of PaddleNLP's MistralConfig."""
    attention = read_attention(config, read_partial_rope(config), window=config.sliding_window)
    blocks = make_blocks([attention] * config.num_hidden_layers, read_mlp(config))
    return read_architecture(config, blocks, prefix="mistral")


FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    tensor_parallel=True,
    pipeline=True,
    sequence_parallel=True,
    # PaddleNLP's own list of LoRA targets (trl/llm_utils.py) has the names of Mixtral's experts here.
    decoder=make_architecture,
    lora_targets=(*SPLIT_ATTENTION, *GATED_MLP),
    kv_axes=BATCH_FIRST,
    free_head_dim=True,
    head_size_multiple=2,
    layer_tables="rotary",
    sliding_window="all_layers",
    hf_config=HFConfig(
        fields={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "head_dim": None,
            "attention_dropout": 0.0,
        },
        supported={"attention_bias": (False,)},
        unread=UNSCALED_ROTARY,
        activation="hidden_act",
    ),
    packing=Packing(takes_ends=True),
    fused_decoder=FusedDecoderSpec(),
    servers=HF_SERVERS,
)
