"""Qwen2."""

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
    """Make the architecture of PaddleNLP's Qwen2Config: queries, keys and values have biases."""
    windows = read_windows(config, lambda i: config.use_sliding_window and i >= config.max_window_layers)
    rope = read_partial_rope(config)
    attentions = [read_attention(config, rope, qkv_bias=True, output_bias=False, window=window) for window in windows]
    return read_architecture(config, make_blocks(attentions, read_mlp(config)), prefix="qwen2")


FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    tensor_parallel=True,
    pipeline=True,
    sequence_parallel=True,
    decoder=make_architecture,
    lora_targets=(*SPLIT_ATTENTION, *GATED_MLP, *FUSED_PROJECTIONS),
    kv_axes=BATCH_FIRST,
    free_head_dim=True,
    head_size_multiple=2,
    layer_tables="rotary",
    sliding_window="upper_layers",
    untied_heads=LM_HEAD_AND_EMBED_TOKENS,
    builtin_configs=True,
    hf_config=HFConfig(
        fields={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "head_dim": None,
            "attention_dropout": 0.0,
        },
        unread=UNSCALED_ROTARY,
        activation="hidden_act",
    ),
    hf_resplits_text=True,
    packing=Packing(takes_ends=True),
    fused_decoder=FusedDecoderSpec(),
    replaceable_attention=True,
    servers=HF_SERVERS | {"fastdeploy"},
)
