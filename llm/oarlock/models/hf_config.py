"""A model's configuration in Hugging Face's words and in PaddleNLP's, both ways.

The tables are read in transformers 4.55 and 5.x and in paddlenlp 3.0.0b4. What one side computes and the other can't is
refused by name; what changes nothing of the scores is left out. Pure Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from oarlock.environment import say_once
from oarlock.errors import ModelError
from oarlock.models.hf_rope import rope_from_hugging_face, rope_to_hugging_face
from oarlock.parallel.families import FAMILIES

_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@dataclass(frozen=True)
class Words:
    """One family.

    Attributes:
        fields: name there -> its default there; what PaddleNLP calls the same unless `here` says otherwise.
        here: name there -> name in PaddleNLP.
        aliases: older names of fields there -> their present ones.
        only: name there -> values PaddleNLP's model computes with, the first of which is what is written.
        paddle_only: field of PaddleNLP's -> the one value that Hugging Face's model computes with.
        rotary: it has rotary embeddings with a base in the configuration.
        scaled: PaddleNLP's model knows scaled rotary embeddings.
    """

    fields: Mapping[str, Any]
    here: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    paddle_only: Mapping[str, Any] = field(default_factory=dict)
    rotary: bool = True
    scaled: bool = False


_LLAMA_LIKE = {"hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
WORDS = {
    "llama": Words(
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": None, "max_position_embeddings": 2048,
            "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        },
        only={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
        paddle_only={"alibi": False, "use_long_sequence_strategies": False},
        scaled=True,
    ),
    "qwen2": Words(
        {
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768, **_LLAMA_LIKE,
        },
    ),
    "mistral": Words(
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, **_LLAMA_LIKE,
        },
        only={"tie_word_embeddings": (False,)},
    ),
    "gemma": Words(
        {
            "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
            "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        },
        only={"attention_bias": (False,), "use_bidirectional_attention": (None, False)},
        paddle_only={"alibi": False},
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
        rotary=False,
    ),
    "gptj": Words(
        {
            "vocab_size": 50400, "n_positions": 2048, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64,
            "n_inner": None, "activation_function": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0,
            "attn_pdrop": 0.0, "initializer_range": 0.02,
        },
        # PaddleNLP's GPT-J sets every norm's epsilon to 1e-5 when it is made.
        only={"layer_norm_epsilon": (1e-5,), "tie_word_embeddings": (False,)},
        paddle_only={"layer_norm_epsilon": 1e-5},
        rotary=False,
    ),
}  # fmt: skip
REFUSED = {
    "chatglm": "transformers has no ChatGLM (its published models bring code of their own)",
    "chatglm_v2": "transformers has no ChatGLM2 (its published models bring code of their own)",
    "glm": "the GLM of transformers is GLM-4; that of PaddleNLP is the older one, with two positions and blank filling",
    "mixtral": "PaddleNLP's Mixtral can't be run here (see `oarlock families`), so nothing could be proven",
}
# Fields there that leave the scores as they are: records, defaults of training and generation, how to compute.
_IGNORED = frozenset(
    {
        "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache",
        "pretraining_tp", "attention_dropout", "classifier_dropout", "output_attentions", "output_hidden_states",
        "return_dict", "is_decoder", "is_encoder_decoder", "id2label", "label2id", "rope_theta", "rope_scaling",
        "rope_parameters", "head_dim", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
        "hidden_act", "hidden_activation", "prefix", "layerdrop", "gradient_checkpointing", "summary_type",
        "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
        "task_specific_params", "tokenizer_class", "rotary", "scale_attn_weights", "bias_dropout_fusion",
        "masked_softmax_fusion", "attention_softmax_in_fp32", "unk_token_id", "offset_alibi", "seq_length",
        "skip_bias_add", "skip_bias_add_qkv", "slow_but_exact", "bad_words_ids", "auto_map",
        "_attn_implementation_autoset", "chunk_size_feed_forward", "n_inner", "problem_type", "mlp_bias",
        "scale_embedding",
    }
)  # fmt: skip


def words_of(family: str) -> Words:
    """The tables of a family.

    Raises:
        ModelError: for one that transformers or PaddleNLP has not, with the reason.
    """
    if family in WORDS:
        return WORDS[family]
    known = f"families that can be converted: {', '.join(WORDS)}"
    raise ModelError(f"{family}: {REFUSED.get(family, 'PaddleNLP and transformers do not both have it')}; {known}")


def from_hugging_face(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Arguments of PaddleNLP's configuration class.

    Args:
        content: of Hugging Face's config.json.
        place: the file, for messages.

    Raises:
        ModelError: for what PaddleNLP's model does not compute, naming the field.
    """
    family = str(content.get("model_type"))
    words = words_of(family)
    if content.get("quantization_config"):
        raise ModelError(f"{place}: quantization_config: the weights are quantised; convert the plain model")
    content = {words.aliases.get(name, name): value for name, value in content.items()}
    for name, allowed in words.only.items():
        if name in content and content[name] not in allowed:
            raise ModelError(
                f"{place}: {name} is {content[name]!r}, and PaddleNLP's {family} computes with {allowed[0]!r} alone"
            )
    found = {words.here.get(name, name): content.get(name, default) for name, default in words.fields.items()}
    found |= {name: content[name] for name in _IDS if content.get(name) is not None}
    found["architectures"] = [FAMILIES[family].model]
    if (dtype := content.get("torch_dtype", content.get("dtype"))) is not None:
        found["dtype"] = str(dtype).removeprefix("torch.")
    if words.rotary:
        found |= rope_from_hugging_face(content, words.scaled, f"{place}: PaddleNLP's {family}")
    found |= _special_from(family, content, place)
    _check_head_size(family, content, found, place)
    known = {*words.fields, *words.only, *_IDS, *_IGNORED}
    unknown = [name for name in content if name not in known]
    if unknown:
        say_once(f"{place}: {', '.join(unknown)}: not known here, left out of PaddleNLP's configuration")
    return {name: value for name, value in found.items() if value is not None}


def to_hugging_face(config: Any, dtype: str, place: str) -> dict[str, Any]:
    """The content of Hugging Face's config.json.

    Args:
        config: PaddleNLP's configuration.
        dtype: of the weights.
        place: the model, for messages.

    Raises:
        ModelError: for what transformers' model does not compute, naming the field.
    """
    family = config.model_type
    words = words_of(family)
    for name, value in words.paddle_only.items():
        if getattr(config, name, value) != value:
            raise ModelError(
                f"{place}: {name} is {getattr(config, name)!r}, and transformers' {family} knows {value!r} alone"
            )
    found: dict[str, Any] = {"architectures": [FAMILIES[family].model], "model_type": family}
    for name, default in words.fields.items():
        found[name] = getattr(config, words.here.get(name, name), default)
    found |= {name: allowed[0] for name, allowed in words.only.items() if allowed[0] is not None}
    found |= {name: getattr(config, name, None) for name in _IDS}
    if words.rotary:
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        found |= rope_to_hugging_face(config, words.scaled, head_size)
    found |= _special_to(family, config)
    return {**found, "use_cache": True, "torch_dtype": dtype}


# what a table can't say


def _special_from(family: str, content: Mapping[str, Any], place: str) -> dict[str, Any]:
    if family == "gemma":
        # "gelu" alone is how the first Gemmas were published, and means the approximation (transformers says so).
        exact = content.get("hidden_activation") == "gelu" or content.get("hidden_act") in ("gelu_python",)
        return {"hidden_act": "gelu" if exact else "gelu_pytorch_tanh"}
    if family == "opt":
        _check_opt(content.get("word_embed_proj_dim"), content.get("hidden_size"), place)
        return {"word_embed_proj_dim": content.get("word_embed_proj_dim") or content.get("hidden_size")}
    window = content.get("sliding_window") if family == "mistral" or content.get("use_sliding_window") else None
    if window and window < content.get("max_position_embeddings", 0):
        say_once(
            f"{place}: PaddleNLP's {family} has no sliding window: scores of texts longer than {window:,} tokens differ"
        )
    return {"sliding_window": window} if family == "mistral" else {}


def _special_to(family: str, config: Any) -> dict[str, Any]:
    if family == "gemma":
        # transformers takes "gelu" in hidden_act for the approximation; vLLM goes by hidden_activation.
        exact = config.hidden_act != "gelu_pytorch_tanh"
        names = ("gelu_python", "gelu") if exact else ("gelu_pytorch_tanh", "gelu_pytorch_tanh")
        return {"hidden_act": names[0], "hidden_activation": names[1]}
    if family == "mistral":
        return {"sliding_window": None}  # PaddleNLP's sees all of the text
    if family == "qwen2":
        return {"use_sliding_window": False}
    if family == "opt":
        _check_opt(config.word_embed_proj_dim, config.hidden_size, "this model")
    return {}


def _check_opt(projected: int | None, hidden: int | None, place: str) -> None:
    if projected and projected != hidden:
        raise ModelError(
            f"{place}: word_embed_proj_dim {projected} is not hidden_size {hidden}: PaddleNLP's OPT can't run that "
            "(its output layer has the hidden size)"
        )


def _check_head_size(family: str, content: Mapping[str, Any], found: Mapping[str, Any], place: str) -> None:
    size = content.get("head_dim")
    if family == "gemma" or size is None or "num_attention_heads" not in found:
        return
    own = found["hidden_size"] // found["num_attention_heads"]
    if size != own:
        raise ModelError(
            f"{place}: head_dim is {size}, and PaddleNLP's {family} computes with hidden_size / heads = {own} alone"
        )
