"""DeepSeek-V3 and R1."""

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
    """Make the architecture of DeepSeek-V3: latent attention, experts by groups, with a bias for the load."""
    moe = read_moe(
        config,
        config.n_routed_experts,
        read_mlp(config, config.moe_intermediate_size),
        router="sigmoid",
        renormalize=config.norm_topk_prob,
        weight_scale=config.routed_scaling_factor,
        groups=config.n_group or 1,
        top_groups=config.topk_group or 1,
        group_score="top2_sum",
        bias_corrected=True,
        shared=read_mlp(config, config.moe_intermediate_size * config.n_shared_experts),
    )
    layers, dense = config.num_hidden_layers, read_mlp(config)
    each = [dense if i < config.first_k_dense_replace else moe for i in range(layers)]
    attention = read_latent_attention(config, interleaved=config.rope_interleave)
    return read_architecture(config, make_blocks([attention] * layers, each))


FAMILY = make_decoder_family(
    "deepseek_v3",
    "DeepseekV3",
    HFConfig(
        fields={
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "routed_scaling_factor": 2.5,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "norm_topk_prob": True,
            "rope_interleave": True,
        },
        aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
        supported={
            "rms_norm_eps": (1e-6,),  # the norms within latent attention have no other one
            "scoring_func": ("sigmoid",),
            "topk_method": ("noaux_tc",),
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
