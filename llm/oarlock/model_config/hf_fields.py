"""The fields of a model's configuration, family by family, as data: what is honoured, what is without effect.

Read in transformers 4.55 and 5.x and in paddlenlp 3.0.0b4; tests/parity/test_config_fields.py changes every field that
transformers declares and compares the scores. Pure Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Words:
    """One family.

    Attributes:
        fields: name there -> its default there; what PaddleNLP calls the same unless `here` says otherwise.
        here: name there -> name in PaddleNLP.
        aliases: older names of fields there -> their present ones.
        only: name there -> values PaddleNLP's model computes with, the first of which is what is written.
        paddle_only: field of PaddleNLP's -> the one value that Hugging Face's model computes with.
        unread: fields that PaddleNLP's class takes and its model does not read -> the values that change nothing.
        ignored: fields of either side that leave the scores as they are.
        dropouts: fields there for training that PaddleNLP's model does not have.
        rotary: it has rotary embeddings with a base in the configuration.
        scaled: PaddleNLP's model knows scaled rotary embeddings.
    """

    fields: Mapping[str, Any]
    here: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    paddle_only: Mapping[str, Any] = field(default_factory=dict)
    unread: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    dropouts: frozenset[str] = frozenset()
    rotary: bool = True
    scaled: bool = False


# PaddleNLP's "gelu_new" is what transformers also calls "gelu_pytorch_tanh".
ACTIVATIONS = {name: name for name in ("silu", "swish", "gelu", "gelu_new", "relu", "quick_gelu")} | {
    "gelu_pytorch_tanh": "gelu_new"
}
_LLAMA_LIKE = {"hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_UNSCALED: dict[str, tuple[Any, ...]] = {"rope_scaling_type": ()}
WORDS = {
    "llama": Words(
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": None, "max_position_embeddings": 2048,
            "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        },
        only={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)},
        paddle_only={"alibi": False, "use_long_sequence_strategies": False},
        dropouts=frozenset({"attention_dropout"}),
        scaled=True,
    ),
    "qwen2": Words(
        {
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768, **_LLAMA_LIKE,
            "attention_dropout": 0.0,
        },
        unread=_UNSCALED,
    ),
    "mistral": Words(
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, **_LLAMA_LIKE,
        },
        only={"tie_word_embeddings": (False,), "attention_bias": (False,)},
        unread=_UNSCALED,
        dropouts=frozenset({"attention_dropout"}),
    ),
    "gemma": Words(
        {
            "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
            "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_dropout": 0.0,
        },
        only={"attention_bias": (False,), "use_bidirectional_attention": (None, False)},
        paddle_only={"alibi": False},
        unread=_UNSCALED,
    ),
    "opt": Words(
        {
            "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072,
            "max_position_embeddings": 2048, "do_layer_norm_before": True, "word_embed_proj_dim": None, "dropout": 0.1,
            "attention_dropout": 0.0, "num_attention_heads": 12, "init_std": 0.02, "tie_word_embeddings": True,
        },
        here={
            "ffn_dim": "intermediate_size", "do_layer_norm_before": "normalize_before",
            "dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob",
            "init_std": "initializer_range",
        },
        only={
            "activation_function": ("relu",), "_remove_final_layer_norm": (False,), "enable_bias": (True,),
            "layer_norm_elementwise_affine": (True,),
        },
        paddle_only={"hidden_act": "relu"},
        ignored=frozenset({"type_vocab_size", "mp_degree"}),
        dropouts=frozenset({"layerdrop", "activation_dropout"}),
        rotary=False,
    ),
    "bloom": Words(
        {
            "vocab_size": 250880, "hidden_size": 64, "n_layer": 2, "n_head": 8, "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02, "apply_residual_connection_post_layernorm": False, "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        aliases={"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
        only={"tie_word_embeddings": (True,)},
        paddle_only={"use_long_sequence_strategies": False},
        ignored=frozenset(
            {
                "offset_alibi", "masked_softmax_fusion", "bias_dropout_fusion", "attention_softmax_in_fp32",
                "skip_bias_add", "skip_bias_add_qkv", "slow_but_exact",
            }
        ),
        rotary=False,
    ),
    "gptj": Words(
        {
            "vocab_size": 50400, "n_positions": 2048, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64,
            "n_inner": None, "activation_function": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0,
            "attn_pdrop": 0.0, "initializer_range": 0.02,
        },
        aliases={
            "max_position_embeddings": "n_positions", "hidden_size": "n_embd", "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer", "embed_dim": "n_embd",
        },
        # PaddleNLP's GPT-J sets every norm's epsilon to 1e-5 when it is made.
        only={
            "layer_norm_epsilon": (1e-5,), "tie_word_embeddings": (False,), "rotary": (True,),
            "scale_attn_weights": (True,),
        },
        paddle_only={"layer_norm_epsilon": 1e-5},
        rotary=False,
    ),
}  # fmt: skip
ACTIVATION_FIELDS = {"qwen2": "hidden_act", "mistral": "hidden_act", "gptj": "activation_function"}
REFUSED = {
    "chatglm": "transformers has no ChatGLM (its published models bring code of their own)",
    "chatglm_v2": "transformers has no ChatGLM2 (its published models bring code of their own)",
    "glm": "the GLM of transformers is GLM-4; that of PaddleNLP is the older one, with two positions and blank filling",
    "mixtral": "PaddleNLP's Mixtral can't be run here (see `oarlock families`), so nothing could be proven",
}
# Families without a model in transformers: fields that PaddleNLP's model does not read -> the values it computes with.
PADDLE_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "chatglm": {"quantization_bit": (0,), "pre_seq_len": (), "prefix_projection": (False,), "num_image_tokens": (0,)},
    "chatglm_v2": {
        "quantization_bit": (0,), "pre_seq_len": (), "prefix_projection": (False,), "interleaved_qkv": (False,),
        "original_rope": (True,), "rope_ratio": (1, 1.0), "multi_query_attention": (True,), "classifier_dropout": (),
    },
    "glm": {"relative_encoding": (False,), "spell_length": ()},
}  # fmt: skip
# Fields of any family that no model here computes with -> the values that mean nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,), "alibi": (False,), "attention_bias": (False,), "attn_logit_softcapping": (0,),
    "embedding_multiplier": (1,), "final_logit_softcapping": (0,), "is_encoder_decoder": (False,),
    "logit_scale": (1,), "logits_scaling": (1,), "mlp_bias": (False,), "parallel_attn": (False,),
    "partial_rotary_factor": (1,), "pruned_heads": ({},), "qk_layernorm": (False,), "qk_norm": (False,),
    "qkv_bias": (False,), "residual_multiplier": (1,), "rotary_pct": (1,), "tie_encoder_decoder": (False,),
    "use_mrope": (False,), "use_qk_norm": (False,), "use_sliding_window": (False,), "sliding_window": (None,),
    "add_bias_linear": (False,), "rope_interleaved": (False,), "is_llama_config": (True,),
}  # fmt: skip
# Fields that leave the scores as they are: records, defaults of generation, how to compute, heads of other tasks.
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
# How a run split its model: nothing of it holds for who reads the folder.
PLAN = frozenset(
    {
        "tensor_parallel_degree",
        "tensor_parallel_rank",
        "tensor_parallel_output",
        "sequence_parallel",
        "virtual_pp_degree",
    }
)
# Fields by which PaddleNLP imports a module and takes a class of it by the names in the file -> values without effect.
IMPORTING: dict[str, tuple[Any, ...]] = {
    "use_long_sequence_strategies": (False,),
    "long_sequence_strategy_type": ("",),
    "long_sequence_strategy_name": ("",),
    "long_sequence_init_args": ({},),
}
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
DTYPES = {
    "float32": "float32", "float": "float32", "fp32": "float32", "float16": "float16", "half": "float16",
    "fp16": "float16", "bfloat16": "bfloat16", "bf16": "bfloat16",
}  # fmt: skip
