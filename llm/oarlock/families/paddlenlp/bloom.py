"""Bloom."""

from oarlock.families.family import Family, HFConfig
from oarlock.families.shared import BATCH_FIRST, HF_SERVERS, MEGATRON_LINEARS

FAMILY = Family(
    name="bloom",
    architecture="BloomForCausalLM",
    tensor_parallel=True,
    pipeline=False,
    sequence_parallel=False,
    lora_targets=MEGATRON_LINEARS,
    kv_axes=BATCH_FIRST,
    positions_follow_prefix=True,
    gated_mlp=False,
    padded_embedding=True,
    linear_init_is_wrong=True,
    hf_config=HFConfig(
        fields={
            "vocab_size": 250880,
            "hidden_size": 64,
            "n_layer": 2,
            "n_head": 8,
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
            "apply_residual_connection_post_layernorm": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        aliases={"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
        supported={"tie_word_embeddings": (True,)},
        required={"use_long_sequence_strategies": False},
        ignored=frozenset(
            {
                "offset_alibi",
                "masked_softmax_fusion",
                "bias_dropout_fusion",
                "attention_softmax_in_fp32",
                "skip_bias_add",
                "skip_bias_add_qkv",
                "slow_but_exact",
            }
        ),
        rotary=False,
    ),
    hf_prefix="transformer.",
    takes_position_ids=False,
    graph_change="bloom_mask",
    servers=HF_SERVERS,
)
