"""Qwen2."""

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

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    tensor_parallel=True,
    pipeline=True,
    sequence_parallel=True,
    lora_targets=(*SPLIT_ATTENTION, *GATED_MLP, *FUSED_PROJECTIONS),
    kv_axes=BATCH_FIRST,
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
