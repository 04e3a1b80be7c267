"""Gemma."""

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
    name="gemma",
    architecture="GemmaForCausalLM",
    tensor_parallel=True,
    pipeline=True,
    sequence_parallel=False,
    lora_targets=(*SPLIT_ATTENTION, *GATED_MLP, *FUSED_PROJECTIONS),
    kv_axes=BATCH_FIRST,
    why_not={"sequence_parallel": "PaddleNLP's GemmaModel reads the shape of the embeddings before it computes them"},
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
            "attention_dropout": 0.0,
        },
        supported={"attention_bias": (False,), "use_bidirectional_attention": (None, False)},
        required={"alibi": False},
        unread=UNSCALED_ROTARY,
        gelu_is_approximate=True,
    ),
    packing=Packing(in_pipeline=False),  # GemmaDecoderLayerPipe drops the positions
    fused_decoder=FusedDecoderSpec(
        norm_offset=1.0, scales_embedding=True, activation="gelu", tied_head_is_transposed=True
    ),
    replaceable_attention=True,
    servers=HF_SERVERS,
)
