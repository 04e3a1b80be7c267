"""Llama."""

from __future__ import annotations

from typing import Any

from oarlock.errors import ModelError
from oarlock.families.architecture import Architecture
from oarlock.families.config_reading import make_blocks, read_architecture, read_attention, read_mlp, read_partial_rope
from oarlock.families.family import Family, FusedDecoderSpec, HFConfig, Packing
from oarlock.families.rope import SCALED_ROTARY
from oarlock.families.shared import (
    BATCH_FIRST,
    FUSED_PROJECTIONS,
    GATED_MLP,
    HF_SERVERS,
    LM_HEAD_AND_EMBED_TOKENS,
    SPLIT_ATTENTION,
)


def make_architecture(config: Any) -> Architecture:
    """Make the architecture of PaddleNLP's LlamaConfig.

    Raises:
        ModelError: for ALiBi.
    """
    if getattr(config, "alibi", False):
        raise ModelError("alibi: models with ALiBi in place of rotary embeddings are not supported")
    attention = read_attention(config, read_partial_rope(config))
    blocks = make_blocks([attention] * config.num_hidden_layers, read_mlp(config))
    return read_architecture(config, blocks, prefix="llama")


FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
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
    builtin_configs=True,
    hf_config=HFConfig(
        fields={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "head_dim": None,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
        },
        required={"alibi": False, "use_long_sequence_strategies": False},
        activation="hidden_act",
        scaled_rotary=SCALED_ROTARY | {"ntk"},
    ),
    packing=Packing(takes_ends=True),
    fused_decoder=FusedDecoderSpec(),
    replaceable_attention=True,
    servers=HF_SERVERS | {"fastdeploy"},
    server_notes={
        "fastdeploy": "FastDeploy has no Llama of its own and runs it through PaddleFormers, more slowly",
    },
)
