"""A tiny model of every family that runs in our own decoder: the arguments of its configuration class in transformers.

Two layers, width 32, the 512 tokens of helpers.make_tiny_tokenizer. Each has what is special about its family: layers
of both kinds, fewer heads of keys, heads that are not hidden size / heads, factors that are not 1.
`AutoConfig.for_model(**TINY_CONFIGS[name])` makes it there. Names are those of families; a second configuration of one
has a name of its own, and all have the family as model_type.
"""

from __future__ import annotations

from typing import Any

_SIZES = {
    "vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
_KINDS = ["sliding_attention", "full_attention"]
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.8,
}  # fmt: skip
_LATENT = _SIZES | {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES},
    "llama3": {
        "model_type": "llama", **_SIZES, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    },
    "qwen2": {
        "model_type": "qwen2", **_SIZES, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1,
    },
    "mistral": {"model_type": "mistral", **_SIZES, "sliding_window": 6},
    "gemma": {"model_type": "gemma", **_SIZES, "head_dim": 16},
    "qwen3": {"model_type": "qwen3", **_SIZES, "head_dim": 16},
    "qwen3_window": {
        "model_type": "qwen3", **_SIZES, "head_dim": 16, "attention_bias": True, "use_sliding_window": True,
        "sliding_window": 6, "max_window_layers": 1, "tie_word_embeddings": True,
    },
    "gemma2": {
        "model_type": "gemma2", **_SIZES, "head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 6,
        "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        "model_type": "gemma3_text", **_SIZES, "head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 6,
        "layer_types": _KINDS,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "phi3": {
        "model_type": "phi3", **_SIZES, "sliding_window": 6, "original_max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                            "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0],
                            "original_max_position_embeddings": 64},
    },
    "glm4": {"model_type": "glm4", **_SIZES, "head_dim": 16},
    "olmo2": {"model_type": "olmo2", **_SIZES},
    "smollm3": {"model_type": "smollm3", **_SIZES, "no_rope_layer_interval": 2},
    "granite": {
        "model_type": "granite", **_SIZES, "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
        "residual_multiplier": 0.5, "logits_scaling": 2.0,
    },
    "mixtral": {
        "model_type": "mixtral", **_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe", **_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 48, "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", **_SIZES, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "norm_topk_prob": True,
    },
    "deepseek_v2": {
        "model_type": "deepseek_v2", **_LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy",
    },
    "deepseek_v3": {"model_type": "deepseek_v3", **_LATENT, "rope_parameters": _YARN},
}  # fmt: skip
