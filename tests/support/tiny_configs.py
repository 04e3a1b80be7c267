"""A tiny model of every family of the own decoder: what transformers' configuration is made with."""

from __future__ import annotations

from typing import Any

_SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 4}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "qwen2": _SIZES,
    "mistral": _SIZES | {"sliding_window": None},
    "gemma": _SIZES | {"head_dim": 16},
    "qwen3": _SIZES | {"head_dim": 16},
    "gemma2": _SIZES | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
    "gemma3_text": _SIZES | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": _SIZES | {"original_max_position_embeddings": 256},
    "glm4": _SIZES | {"head_dim": 16},
    "olmo2": _SIZES,
    "smollm3": _SIZES | {"num_hidden_layers": 4},
    "granite": _SIZES | {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2},
    "mixtral": _SIZES | {"num_local_experts": 4},
    "qwen2_moe": _SIZES | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 40},
    "qwen3_moe": _SIZES | _EXPERTS | {"num_experts": 4, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [0]},
    "deepseek_v2": _SIZES | _EXPERTS | _LATENT | {"q_lora_rank": None, "n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "deepseek_v3": _SIZES | _EXPERTS | _LATENT | {"q_lora_rank": 16, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gpt_oss": _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
}  # fmt: skip
