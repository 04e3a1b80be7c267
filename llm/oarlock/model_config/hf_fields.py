"""Fields of a config.json that mean the same in every family. Those of one family are in its record (HFConfig).

Read in transformers 4.55 and 5.x and in paddlenlp 3.0.0b4. Nothing here needs Paddle.
"""

from __future__ import annotations

from typing import Any

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# transformers calls PaddleNLP's "gelu_new" "gelu_pytorch_tanh", too.
ACTIVATIONS = {name: name for name in ("silu", "swish", "gelu", "gelu_new", "relu", "quick_gelu")} | {
    "gelu_pytorch_tanh": "gelu_new"
}
# Fields that no model here computes with -> the values that have no effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,), "alibi": (False,), "attention_bias": (False,), "attn_logit_softcapping": (0,),
    "embedding_multiplier": (1,), "final_logit_softcapping": (0,), "is_encoder_decoder": (False,),
    "logit_scale": (1,), "logits_scaling": (1,), "mlp_bias": (False,), "parallel_attn": (False,),
    "partial_rotary_factor": (1,), "pruned_heads": ({},), "qk_layernorm": (False,), "qk_norm": (False,),
    "qkv_bias": (False,), "residual_multiplier": (1,), "rotary_pct": (1,), "tie_encoder_decoder": (False,),
    "use_mrope": (False,), "use_qk_norm": (False,), "use_sliding_window": (False,), "sliding_window": (None,),
    "add_bias_linear": (False,), "rope_interleaved": (False,), "is_llama_config": (True,),
}  # fmt: skip
# Fields that do not affect the logits: records, generation defaults, how to compute, heads of other tasks.
RECORDS = frozenset(
    {
        "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "paddlenlp_version",
        "name_or_path", "auto_map", "tokenizer_class", "prefix", "finetuning_task", "task_specific_params",
        "problem_type", "id2label", "label2id", "num_labels", "num_choices", "classifier_dropout", "summary_type",
        "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
        "use_cache", "pretraining_tp", "is_decoder", "return_dict", "output_attentions", "output_hidden_states",
        "return_dict_in_generate", "output_scores", "gradient_checkpointing", "chunk_size_feed_forward",
        "torchscript", "use_bfloat16", "tf_legacy_loss", "attn_implementation", "experts_implementation",
        "cross_attention_hidden_size", "decoder_start_token_id", "sep_token_id", "unk_token_id", "mask_token_id",
        "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
        "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
        "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
        "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
        "suppress_tokens", "begin_suppress_tokens", "max_sequence_length", "model_max_length", "seq_length",
        "bad_words_id", "use_recompute", "use_fast_layer_norm", "lm_shift_labels", "fp16_opt_level", "init_class",
        "unsloth_version", "unsloth_fixed", "transformers.js_config", "license", "language", "tags", "library_name",
    }
)  # fmt: skip
# How a run split its model, which does not apply to readers of the folder.
PLAN = frozenset(
    {
        "tensor_parallel_degree",
        "tensor_parallel_rank",
        "tensor_parallel_output",
        "expert_parallel_degree",
        "expert_parallel_rank",
        "sequence_parallel",
        "virtual_pp_degree",
    }
)
# Fields from which PaddleNLP imports a class by name -> values without effect.
IMPORTING: dict[str, tuple[Any, ...]] = {
    "use_long_sequence_strategies": (False,),
    "long_sequence_strategy_type": ("",),
    "long_sequence_strategy_name": ("",),
    "long_sequence_init_args": ({},),
}
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")  # of our own configurations
DTYPES = {
    "float32": "float32", "float": "float32", "fp32": "float32", "float16": "float16", "half": "float16",
    "fp16": "float16", "bfloat16": "bfloat16", "bf16": "bfloat16",
}  # fmt: skip
