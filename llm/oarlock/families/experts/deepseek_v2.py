"""DeepSeek-V2."""

from __future__ import annotations

from typing import Any

from oarlock.families.architecture import Architecture
from oarlock.families.config_reading import (
    make_blocks,
    read_architecture,
    read_latent_attention,
    read_mlp,
    read_moe,
)
from oarlock.families.family import HFConfig
from oarlock.families.shared import LATENT_ATTENTION, make_decoder_family


def make_architecture(config: Any) -> Architecture:
    """Make the architecture of DeepSeek-V2: latent attention, experts chosen by groups if topk_method says so."""
    in_groups = config.topk_method == "group_limited_greedy"
    moe = read_moe(
        config,
        config.n_routed_experts,
        read_mlp(config, config.moe_intermediate_size, bias=False),
        renormalize=False,
        weight_scale=config.routed_scaling_factor,
        groups=(config.n_group or 1) if in_groups else 1,
        top_groups=(config.topk_group or 1) if in_groups else 1,
        shared=read_mlp(config, config.moe_intermediate_size * config.n_shared_experts),
    )
    layers, dense = config.num_hidden_layers, read_mlp(config)
    each = [dense if i < config.first_k_dense_replace else moe for i in range(layers)]
    attention = read_latent_attention(config, interleaved=True)
    return read_architecture(config, make_blocks([attention] * layers, each))


FAMILY = make_decoder_family(
    "deepseek_v2",
    "DeepseekV2",
    HFConfig(
        fields={
            "vocab_size": 102400,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "moe_intermediate_size": 1407,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "num_experts_per_tok": None,
            "n_group": None,
            "topk_group": None,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.0,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "mlp_bias": False,
            "topk_method": "greedy",
        },
        aliases={"num_experts": "n_routed_experts"},
        supported={
            "rms_norm_eps": (1e-6,),  # the norms within latent attention have no other one
            "topk_method": ("greedy", "group_limited_greedy"),
            "norm_topk_prob": (False,),
            "scoring_func": ("softmax",),
            "moe_layer_freq": (1,),
        },
        ignored=frozenset(
            {
                *("head_dim", "qk_head_dim", "num_nextn_predict_layers", "ep_size", "aux_loss_alpha", "seq_aux"),
                "output_router_logits",
            }
        ),
        dropouts=frozenset({"attention_dropout"}),
        equal={"num_key_value_heads": "num_attention_heads"},
        activation="hidden_act",
    ),
    make_architecture,
    lora_targets=LATENT_ATTENTION,
    kv_axes=(),
    why_not={"kv_axes": "its layers compress keys and values, so a prefix would have to be compressed, too"},
)
