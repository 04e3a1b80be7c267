"""Converts a model's configuration between Hugging Face's and PaddleNLP's fields.

What one side computes and the other can't is refused by name, and so are unknown fields. Fields that don't affect the
logits are dropped. Only the fields decide, not the program that wrote the file. Nothing here needs Paddle.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from oarlock.environment.console import log_once
from oarlock.errors import ModelError
from oarlock.families.family import HFConfig
from oarlock.families.registry import FAMILIES, HF_CONFIGS, find_hf_config
from oarlock.model_config.family_detection import detect_family, detect_writer
from oarlock.model_config.hf_fields import (
    ACTIVATIONS,
    DTYPES,
    IMPORTING,
    NEUTRAL,
    PLAN,
    RECORDS,
    ROPE,
    ROPE_FIELDS,
    TOKEN_IDS,
)
from oarlock.model_config.hf_rope import LENGTH, convert_rope_from_hf, convert_rope_to_hf, read_rope_fields
from oarlock.model_config.sliding_window import from_hugging_face as window_from
from oarlock.model_config.sliding_window import to_hugging_face as window_to

_NULL_IS_A_VALUE = (
    "sliding_window", "num_key_value_heads", "attn_logit_softcapping", "final_logit_softcapping",
    "q_lora_rank",
)  # fmt: skip
_NULL_HAS_MEANING = (*_NULL_IS_A_VALUE, "rotary_dim")
_ZERO_HAS_MEANING = ("sliding_window", "max_window_layers", "first_k_dense_replace")
_QUANTIZED = ("quantization_config", "quantization", "compression_config")


def make_arguments(content: Mapping[str, Any], place: str, own: Collection[str]) -> dict[str, Any]:
    """Make the arguments of a family's configuration class from a config.json of either side.

    Args:
        content: of config.json.
        place: the file, for messages.
        own: fields of this class.

    Raises:
        ModelError: for what the family's model does not compute, naming the field.
    """
    family = detect_family(content, place)
    writer = detect_writer(content, own)
    content = {k: v for k, v in content.items() if v is not None or k in _NULL_HAS_MEANING}
    quantized = next((name for name in _QUANTIZED if _is_set(content.get(name))), None)
    if quantized is not None:
        raise ModelError(f"{place}: {quantized}: the weights are quantized; use the model that is not quantized")
    importing = next(
        (name for name, allowed in IMPORTING.items() if content.get(name, allowed[0]) not in allowed), None
    )
    if importing is not None:
        raise ModelError(
            f"{place}: {importing} ({_shorten(content[importing])}) names code that PaddleNLP would import; a model's "
            "files may not choose code"
        )
    content = {k: v for k, v in content.items() if k not in PLAN and k not in _QUANTIZED and k not in IMPORTING}
    if family in HF_CONFIGS:
        found = _convert_hf_family(family, content, place, own, writer)
    else:
        found = _convert_paddle_family(family, content, place, own)
    found["architectures"] = [FAMILIES[family].architecture]
    dtypes: dict[str, str] = {}
    for name in ("torch_dtype", "dtype"):
        if name in content and content[name] != "auto":
            dtype = DTYPES.get(str(content[name]).removeprefix("torch."))
            if dtype is None:
                raise ModelError(f"{place}: {name} is {content[name]!r}, not one of float32, float16, bfloat16")
            dtypes[name] = dtype
    if len(set(dtypes.values())) > 1:
        raise ModelError(f"{place}: torch_dtype is {dtypes['torch_dtype']} and dtype is {dtypes['dtype']}")
    if dtypes:
        found["dtype"] = next(iter(dtypes.values()))
    return found


def _convert_hf_family(
    family: str, content: Mapping[str, Any], place: str, own: Collection[str], writer: str
) -> dict[str, Any]:
    words = HF_CONFIGS[family]
    content = _resolve_aliases(content, words, place)
    for name, allowed in words.supported.items():
        if name in content and content[name] not in allowed:
            raise ModelError(
                f"{place}: {name} is {content[name]!r}, but {_name_model(family)} only computes with {allowed[0]!r}"
            )
    found: dict[str, Any] = {}
    for name, default in words.fields.items():
        if name in content:
            found[words.paddle_names.get(name, name)] = _check_value(name, content[name], default, place)
        elif writer == "pt" and default is not None:
            found[words.paddle_names.get(name, name)] = default
    found |= {name: _check_token_id(name, content[name], place) for name in TOKEN_IDS if name in content}
    special = {**_convert_activation(family, content, place, writer), **window_from(family, content, place)}
    for name, other in words.equal.items():
        _check_equal(family, content, name, other, place)
        if given := content.get(name) or content.get(other):
            special[name] = given
    mapped = {*words.fields, *words.supported, *TOKEN_IDS, *special, *ROPE_FIELDS, "hidden_activation", "layer_types"}
    if FAMILIES[family].own_config:
        mapped |= {*ROPE, words.local_theta, LENGTH}
    rest = {name: value for name, value in content.items() if name not in mapped}
    for name, value in rest.items():
        if name in words.unread and value not in words.unread[name]:
            raise ModelError(f"{place}: {name} is {value!r}, but {_name_model(family)} does not compute with it")
        if name in words.dropouts and value:
            log_once(f"{place}: {name} {value}: {_name_model(family)} lacks it, so training runs without it")
        if name in own and name not in RECORDS and (name not in NEUTRAL or name in words.required):
            same = next(
                (there for there, here in words.paddle_names.items() if here == name and there in content), None
            )
            if same is not None and content[same] != value:
                raise ModelError(
                    f"{place}: {same} is {content[same]!r} and {name} is {value!r}, but they mean the same"
                )
            found[name] = value
        elif name == "seq_length" and name in own:
            found[name] = value
    found |= special
    _check_head_size(family, content, found, place)
    if FAMILIES[family].own_config:
        found |= read_rope_fields(content, words, f"{place}: {_name_model(family)}")
        if words.partial_rotary_factor is None and found["partial_rotary_factor"] not in (None, 1):
            raise ModelError(f"{place}: {_name_model(family)} has no partial_rotary_factor")
    elif words.rotary:
        found |= convert_rope_from_hf(content, words.scaled_rotary, f"{place}: {_name_model(family)}")
    elif any(_is_set(content.get(name)) for name in ROPE_FIELDS[1:]):
        raise ModelError(f"{place}: {ROPE_FIELDS[1]}: {_name_model(family)} has no scaled rotary embeddings")
    known = {*(set(own) - (set(NEUTRAL) - set(words.required))), *words.ignored, *words.dropouts, "head_dim"}
    _refuse_unknown(family, rest, known, place)
    return found


def _convert_paddle_family(family: str, content: Mapping[str, Any], place: str, own: Collection[str]) -> dict[str, Any]:
    """Convert a family that transformers lacks."""
    only = FAMILIES[family].paddle_values
    for name, allowed in only.items():
        if name in content and content[name] not in allowed:
            raise ModelError(
                f"{place}: {name} is {content[name]!r}, but {_name_model(family)} does not compute with it"
            )
    _refuse_unknown(family, {k: v for k, v in content.items() if k not in only}, set(own), place)
    records = {"architectures", "model_type", "torch_dtype", "dtype"}
    return {name: value for name, value in content.items() if name in own and name not in records}


def _name_model(family: str) -> str:
    return f"{'PaddleNLP' if FAMILIES[family].decoder is None else 'Oarlock'}'s {family}"


def _refuse_unknown(family: str, rest: Mapping[str, Any], known: Collection[str], place: str) -> None:
    unknown = []
    for name, value in rest.items():
        if name in known or name in RECORDS or name.startswith("_"):
            continue
        if name in NEUTRAL and value in NEUTRAL[name]:
            continue
        unknown.append(f"{name} ({_shorten(value)})")
    if unknown:
        raise ModelError(
            f"{place}: {', '.join(unknown)}: {_name_model(family)} does not compute with "
            f"{'it' if len(unknown) == 1 else 'them'}, so the model would be another one; remove fields from "
            "the file that are only notes"
        )


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _is_set(value: Any) -> bool:
    """Whether a nested setting is not empty (PaddleNLP writes one full of defaults)."""
    if isinstance(value, Mapping) and "weight_quantize_algo" in value:
        return value["weight_quantize_algo"] is not None
    return bool(value)


def _resolve_aliases(content: Mapping[str, Any], words: HFConfig, place: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        own = words.aliases.get(name, name)
        if own in found and found[own] != value:
            raise ModelError(f"{place}: {own} is set twice, to {found[own]!r} and as {value!r} ({name})")
        found[own] = value
    return found


def _check_value(name: str, value: Any, default: Any, place: str) -> Any:
    if (value is None and name in _NULL_IS_A_VALUE) or (default is None and isinstance(value, (list, float))):
        return value  # the schema has checked it
    kinds: Any = bool if isinstance(default, bool) else (int, float) if isinstance(default, float) else int
    kinds = str if isinstance(default, str) else kinds
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        words = {bool: "true or false", int: "a whole number", str: "a text"}.get(kinds, "a number")
        raise ModelError(f"{place}: {name} has to be {words}; it is {_shorten(value)}")
    # Sizes and lengths; with a negative one, Paddle's kernels access memory out of bounds.
    smallest = 0 if name in _ZERO_HAS_MEANING else 1
    if (kinds is int and value < smallest) or (kinds == (int, float) and not 0 <= value < math.inf):
        raise ModelError(
            f"{place}: {name} has to be {'above 0' if kinds is int and smallest else 'at least 0'}; it is {value!r}"
        )
    return value


def _check_token_id(name: str, value: Any, place: str) -> Any:
    """Check a token id. Older files write -1 for none, and eos_token_id may be a list."""
    tokens = value if isinstance(value, list) and name == "eos_token_id" else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in tokens):
        raise ModelError(f"{place}: {name} must be a whole number, not {_shorten(value)}")
    return value


def to_hugging_face(config: Any, dtype: str, place: str) -> dict[str, Any]:
    """Make the content of Hugging Face's config.json.

    Args:
        config: PaddleNLP's configuration.
        dtype: of the weights.
        place: the model, for messages.

    Raises:
        ModelError: for what transformers' model does not compute, naming the field.
    """
    family = config.model_type
    words = find_hf_config(family)
    for name, value in words.required.items():
        if getattr(config, name, value) != value:
            raise ModelError(
                f"{place}: {name} is {getattr(config, name)!r}, but transformers' {family} only supports {value!r}"
            )
    found: dict[str, Any] = {"architectures": [FAMILIES[family].architecture], "model_type": family}
    for name, default in words.fields.items():
        value = getattr(config, words.paddle_names.get(name, name), default)
        if value is not None or default is not None or FAMILIES[family].decoder is None:
            found[name] = value
    found |= {
        name: allowed[0]
        for name, allowed in words.supported.items()
        if allowed[0] is not None and name not in words.fields
    }
    found |= {name: getattr(config, name, None) for name in TOKEN_IDS}
    if FAMILIES[family].own_config:
        found |= {name: value for name in ROPE if (value := getattr(config, name)) is not None}
    elif words.rotary:
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        found |= convert_rope_to_hf(config, words.scaled_rotary, head_size)
    if words.gelu_is_approximate:
        # transformers reads "gelu" in hidden_act as the approximation; vLLM reads hidden_activation.
        exact = config.hidden_act != "gelu_pytorch_tanh"
        names = ("gelu_python", "gelu") if exact else ("gelu_pytorch_tanh", "gelu_pytorch_tanh")
        found |= {"hidden_act": names[0], "hidden_activation": names[1]}
    for name, other in words.equal.items():
        _check_equal(family, {key: getattr(config, key) for key in (name, other)}, name, other, "this model")
    return {**found, **window_to(config), "use_cache": True, "torch_dtype": dtype}


def _convert_activation(family: str, content: Mapping[str, Any], place: str, writer: str) -> dict[str, Any]:
    if HF_CONFIGS[family].gelu_is_approximate:
        # The first Gemmas were published with "gelu", which means the approximation (as transformers notes).
        act, newer = content.get("hidden_act"), content.get("hidden_activation")
        approximate = ("gelu", "gelu_pytorch_tanh", "gelu_new", None)
        if writer == "np" and act in ("gelu", None) and newer in ("gelu", None):
            return {"hidden_act": "gelu"}  # PaddleNLP's word for the exact one
        if act == "gelu_python" and newer in ("gelu", None):
            return {"hidden_act": "gelu"}
        if act in approximate and newer in approximate[1:]:
            return {"hidden_act": "gelu_pytorch_tanh"}
        named = f"hidden_act is {act!r}" + (f" and hidden_activation {newer!r}" if newer is not None else "")
        raise ModelError(
            f"{place}: {named}, but {_name_model(family)} only computes with gelu_pytorch_tanh, or with "
            "gelu_python and gelu"
        )
    name = HF_CONFIGS[family].activation
    if not name or name not in content:
        return {}
    if FAMILIES[family].own_config and content[name] in (*ACTIVATIONS, "gelu_python"):
        return {}  # the name stays transformers'
    if content[name] not in ACTIVATIONS:
        raise ModelError(
            f"{place}: {name} is {_shorten(content[name])}, but {_name_model(family)} computes with "
            f"one of {', '.join(ACTIVATIONS)}"
        )
    return {name: ACTIVATIONS[content[name]]}


def _check_equal(family: str, content: Mapping[str, Any], name: str, other: str, place: str) -> None:
    if content.get(name) and content[name] != content.get(other):
        raise ModelError(
            f"{place}: {name} {content[name]} is not {other} {content.get(other)}: {_name_model(family)} can't run that"
        )


def _check_head_size(family: str, content: Mapping[str, Any], found: Mapping[str, Any], place: str) -> None:
    size = content.get("head_dim")
    if (
        FAMILIES[family].free_head_dim
        or size is None
        or "num_attention_heads" not in found
        or "hidden_size" not in found
    ):
        return
    own = found["hidden_size"] // found["num_attention_heads"]
    if size != own:
        raise ModelError(
            f"{place}: head_dim is {size}, but {_name_model(family)} only computes with hidden_size / heads = {own}"
        )
