"""Converts scaled rotary embeddings between Hugging Face's and PaddleNLP's fields.

Hugging Face: rope_theta and a dictionary rope_scaling, or (transformers 5) both in rope_parameters. PaddleNLP:
rope_theta, rope_scaling_type and rope_scaling_factor, and for Llama 3 the same dictionary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from oarlock.environment.console import log_once
from oarlock.errors import ModelError
from oarlock.families.family import HFConfig

_KINDS = {"linear": "linear", "dynamic": "dynamic_ntk"}  # Hugging Face's name -> PaddleNLP's
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
LENGTH = "original_max_position_embeddings"  # in the parameters; Phi-3 has it beside them, which counts more
_ANY = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
# The keys that each kind reads.
_READ: dict[str, tuple[str, ...]] = {
    "default": (*_ANY, "factor", "original_max_position_embeddings"),
    "linear": (*_ANY, "factor", "original_max_position_embeddings"),
    "dynamic": (*_ANY, "factor", "original_max_position_embeddings"),
    "llama3": (*_ANY, *_LLAMA3),
}


_SLIDING, _FULL = "sliding_attention", "full_attention"
_KINDS_WITH_LENGTH = ("llama3", "yarn", "longrope")


def read_rope_fields(content: Mapping[str, Any], words: HFConfig, who: str) -> dict[str, Any]:
    """Make the fields of our own configurations: rope_theta, rope_scaling and partial_rotary_factor, as transformers 4.

    families.rope.read_rope() checks what each kind of scaling needs.

    Args:
        content: of config.json, without nulls.
        words: of the family.
        who: file and family, for messages.

    Raises:
        ModelError: for parameters that contradict each other, or of single layers where the family has none.
    """
    found, nested = {}, content.get("rope_parameters")
    if words.local_theta and nested:
        if not isinstance(nested, Mapping) or set(nested) - {_SLIDING, _FULL}:
            raise ModelError(f"{who}: rope_parameters has to have {_FULL} and {_SLIDING}; it is {nested!r}")
        local = dict(nested.get(_SLIDING) or {})
        theta, kind = local.pop("rope_theta", None), local.pop("rope_type", "default")
        if kind != "default" or local:
            raise ModelError(f"{who} has no scaled rotary embeddings in its sliding layers (rope_parameters)")
        found = {words.local_theta: theta} if theta is not None else {}
        content = {**content, "rope_parameters": nested.get(_FULL)}
    kind, rope = _read_parameters(content, who)
    for name, default in (("rope_theta", words.rope_theta), ("partial_rotary_factor", words.partial_rotary_factor)):
        if {name} <= content.keys() & rope.keys() and content[name] != rope[name]:
            raise ModelError(f"{who}: {name} is {content[name]!r}, and {rope[name]!r} among the rope parameters")
        value = rope.get(name, content.get(name, default))
        found[name] = None if value is None else _check_number(value, name, who)
    if kind != "default":
        scaling = {key: value for key, value in rope.items() if key not in ("type", *found)}
        length = content.get(LENGTH, words.fields.get(LENGTH))
        if length is not None and kind in _KINDS_WITH_LENGTH:
            scaling[LENGTH] = length
        found["rope_scaling"] = {**scaling, "rope_type": kind}
    return found


def convert_rope_from_hf(content: Mapping[str, Any], scaled: bool, who: str) -> dict[str, Any]:
    """Make PaddleNLP's fields.

    Args:
        content: of config.json, without nulls.
        scaled: PaddleNLP's model supports scaling.
        who: file and family, for messages.

    Raises:
        ModelError: for a scaling that PaddleNLP does not compute.
    """
    kind, rope = _read_parameters(content, who)
    factor = rope.get("factor", 1.0)
    if {"rope_theta"} <= content.keys() & rope.keys() and content["rope_theta"] != rope["rope_theta"]:
        raise ModelError(
            f"{who}: rope_theta is {content['rope_theta']!r}, and {rope['rope_theta']!r} among the rope parameters: "
            "keep one of them"
        )
    found = {"rope_theta": _check_number(rope.get("rope_theta", content.get("rope_theta", 10000.0)), "rope_theta", who)}
    if rope.get("partial_rotary_factor", content.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError(f"{who} has no partial_rotary_factor")
    if kind in _READ and (unread := sorted(set(rope) - set(_READ[kind]))):
        raise ModelError(f"{who} does not know {', '.join(unread)} in rope_scaling of type {kind!r}")
    if kind in _KINDS and "factor" not in rope:
        raise ModelError(f"{who}: rope_scaling of type {kind} lacks factor")
    if kind == "default" or (kind in _KINDS and factor == 1.0):
        return found
    if not scaled or kind not in (*_KINDS, "llama3"):
        knows = ", ".join((*_KINDS, "llama3")) if scaled else "none"
        raise ModelError(f"{who} does not know rope_scaling of type {kind!r} (it knows: {knows})")
    if content.get("rope_scaling_type") is not None:
        raise ModelError(f"{who}: rope_scaling of type {kind!r} and rope_scaling_type: keep one of them")
    if kind == "llama3":
        missing = [name for name in _LLAMA3 if name not in rope]
        if missing:
            raise ModelError(f"{who}: rope_scaling of type llama3 lacks {', '.join(missing)}")
        return found | {
            "rope_scaling": {"rope_type": kind} | {name: _check_number(rope[name], name, who) for name in _LLAMA3}
        }
    original = rope.get("original_max_position_embeddings")
    if kind == "dynamic" and original not in (None, content.get("max_position_embeddings")):
        raise ModelError(
            f"{who}: dynamic rope_scaling from {original} positions, where max_position_embeddings says "
            f"{content.get('max_position_embeddings')}: PaddleNLP has one number for both"
        )
    return found | {"rope_scaling_type": _KINDS[kind], "rope_scaling_factor": _check_number(factor, "factor", who)}


def _read_parameters(content: Mapping[str, Any], who: str) -> tuple[str, dict[str, Any]]:
    """Return the kind (rope_type, or type as in older files), and rope_parameters or rope_scaling without nulls.

    Raises:
        ModelError: when it is not an object, the two differ, it differs by kind of layer, or the kind is not clear.
    """
    given = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = content.get(name) or {}
        if not isinstance(value, Mapping):
            raise ModelError(f"{who}: {name} has to be an object; it is {value!r}")
        if any(isinstance(own, Mapping) for own in value.values()):
            raise ModelError(f"{who} does not know {name} of single layers ({', '.join(value)})")
        given[name] = {key: own for key, own in value.items() if own is not None}
    newer, older = given["rope_parameters"], given["rope_scaling"]
    differing = [name for name in older if name in newer and newer[name] != older[name]]
    if newer and older and (differing or set(older) - set(newer) - {"type", "rope_type"}):
        raise ModelError(f"{who}: rope_scaling and rope_parameters say different things: keep one of them")
    rope = newer or older
    kinds = [rope[name] for name in ("rope_type", "type") if name in rope]
    if not all(isinstance(kind, str) for kind in kinds) or len(set(kinds)) > 1:
        raise ModelError(f"{who}: rope_scaling has to be of one type; it names {' and '.join(map(repr, kinds))}")
    if not kinds and rope.get("factor", 1.0) != 1.0:
        raise ModelError(f"{who}: rope_scaling with factor {rope['factor']!r} does not say its type (rope_type)")
    return kinds[0] if kinds else "default", rope


def _check_number(value: Any, name: str, who: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ModelError(f"{who}: {name} has to be a positive number; it is {value!r}")
    return value


def convert_rope_to_hf(config: Any, scaled: bool, head_size: int) -> dict[str, Any]:
    """Make rope_theta and rope_scaling.

    "ntk" only changes the base, so it becomes another base. PaddleNLP then also computes more positions.

    Args:
        config: PaddleNLP's.
        scaled: PaddleNLP's model applies its own fields for scaling.
        head_size: of queries and keys.
    """
    theta = float(getattr(config, "rope_theta", 10000.0))
    kind, factor = getattr(config, "rope_scaling_type", None), getattr(config, "rope_scaling_factor", 1.0)
    llama3 = getattr(config, "rope_scaling", None) or {}
    if not scaled:
        if kind is not None or llama3:
            log_once(f"PaddleNLP's {config.model_type} ignores its rope_scaling, which is dropped")
        return {"rope_theta": theta, "rope_scaling": None}
    if llama3.get("rope_type") == "llama3":
        return {"rope_theta": theta, "rope_scaling": {"rope_type": "llama3"} | {k: llama3[k] for k in _LLAMA3}}
    if kind is None:
        return {"rope_theta": theta, "rope_scaling": None}
    if kind == "ntk":
        return {
            "rope_theta": theta * factor ** (head_size / (head_size - 2)),
            "rope_scaling": None,
            "max_position_embeddings": round(config.max_position_embeddings * factor),
        }
    names = {here: there for there, here in _KINDS.items()}
    if kind not in names:
        raise ModelError(
            f"rope_scaling_type {kind!r} is not supported by transformers ({', '.join(names)}, ntk, llama3)"
        )
    return {"rope_theta": theta, "rope_scaling": {"rope_type": names[kind], "factor": float(factor)}}
