"""Mistral.

PaddleNLP computes its attention in the layer's forward, without a function that could be replaced, and its rotary
embeddings in another layout.
"""

from oarlock.families.family import Family, FusedDecoderSpec, HFConfig, Packing
from oarlock.families.shared import GATED_MLP, HEADS_BEFORE_TOKENS, HF_SERVERS, SPLIT_ATTENTION, UNSCALED_ROTARY

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    tensor_parallel=True,
    pipeline=False,
    sequence_parallel=False,
    # PaddleNLP's own list of LoRA targets (trl/llm_utils.py) has the names of Mixtral's experts here.
    lora_targets=(*SPLIT_ATTENTION, *GATED_MLP),
    kv_axes=HEADS_BEFORE_TOKENS,
    head_size_multiple=2,
    padded_embedding=True,
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
        },
        supported={"tie_word_embeddings": (False,), "attention_bias": (False,)},
        unread=UNSCALED_ROTARY,
        dropouts=frozenset({"attention_dropout"}),
        activation="hidden_act",
    ),
    packing=Packing(),
    fused_decoder=FusedDecoderSpec(),
    servers=HF_SERVERS,
)
