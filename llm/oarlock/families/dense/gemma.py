"""Gemma."""

from __future__ import annotations

from typing import Any

from oarlock.families.architecture import Architecture
from oarlock.families.config_reading import make_blocks, read_architecture, read_attention, read_mlp, read_partial_rope
from oarlock.families.family import Family, FusedDecoderSpec, HFConfig, Packing
from oarlock.families.shared import (
    BATCH_FIRST,
    FUSED_PROJECTIONS,
    GATED_MLP,
    HF_SERVERS,
    LM_HEAD_AND_EMBED_TOKENS,
    SPLIT_ATTENTION,
    UNSCALED_ROTARY,
)


def make_architecture(config: Any) -> Architecture:
    """Make the architecture of PaddleNLP's GemmaConfig, whose hidden_act says "gelu" for the exact function."""
    attention = read_attention(config, read_partial_rope(config))
    blocks = make_blocks([attention] * config.num_hidden_layers, read_mlp(config))
    scale = config.hidden_size**0.5
    return read_architecture(config, blocks, prefix="gemma", norm_offset=1.0, embedding_scale=scale)


FAMILY = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    tensor_parallel=True,
    pipeline=True,
    sequence_parallel=True,
    decoder=make_architecture,
    lora_targets=(*SPLIT_ATTENTION, *GATED_MLP, *FUSED_PROJECTIONS),
    kv_axes=BATCH_FIRST,
    free_head_dim=True,
    head_size_multiple=2,
    layer_tables="rotary",
    untied_heads=LM_HEAD_AND_EMBED_TOKENS,
    hf_config=HFConfig(
        fields={
            "vocab_size": 256000,
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "attention_dropout": 0.0,
        },
        supported={"use_bidirectional_attention": (None, False)},
        required={"alibi": False},
        unread=UNSCALED_ROTARY,
        gelu_is_approximate=True,
    ),
    packing=Packing(takes_ends=True),
    fused_decoder=FusedDecoderSpec(
        norm_offset=1.0, scales_embedding=True, activation="gelu", tied_head_is_transposed=True
    ),
    replaceable_attention=True,
    servers=HF_SERVERS,
)
