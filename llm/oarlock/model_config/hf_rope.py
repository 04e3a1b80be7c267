"""Converts the fields of rotary embeddings between Hugging Face's, PaddleNLP's and ours.

transformers 4: rope_theta, partial_rotary_factor and a dictionary rope_scaling. transformers 5: all in rope_parameters.
Ours are those of transformers 4, with rope_scaling as Rope.scaling and a rope_type. PaddleNLP's Llama has
rope_scaling_type and rope_scaling_factor in place of some kinds of rope_scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarlock.errors import ModelError
from oarlock.families.family import HFConfig
from oarlock.families.rope import LENGTH, check_number, check_scaling, read_rope

_PADDLE_NAMES = {"linear": "linear", "dynamic": "dynamic_ntk"}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_OTHERS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_rope_fields(content: Mapping[str, Any], words: HFConfig, who: str) -> dict[str, Any]:
    """Make our fields: rope_theta, partial_rotary_factor, the base of sliding layers, and rope_scaling if there is one.

    Args:
        content: of config.json, without nulls.
        words: of the family.
        who: file and family, for messages.

    Raises:
        ModelError: naming what is missing, wrong, or not computed by the family's model.
    """
    found: dict[str, Any] = {}
    nested = content.get("rope_parameters")
    if words.local_theta and nested:
        if not isinstance(nested, Mapping) or set(nested) - {_SLIDING, _FULL}:
            raise ModelError(f"{who}: rope_parameters has to have {_FULL} and {_SLIDING}; it is {nested!r}")
        kind, local = _read_parameters({"rope_parameters": nested.get(_SLIDING)}, f"{who}: {_SLIDING}")
        if kind != "default" or set(local) - {*_OTHERS[:3]}:
            raise ModelError(f"{who} has no scaled rotary embeddings in its sliding layers (rope_parameters)")
        theta = local.get("rope_theta", content.get(words.local_theta))
        if theta != content.get(words.local_theta, theta):
            raise ModelError(f"{who}: {words.local_theta} and rope_parameters say different things: keep one of them")
        if theta is not None:
            found[words.local_theta] = check_number(theta, words.local_theta, who)
        content = {**content, "rope_parameters": nested.get(_FULL)}
    kind, rope = _read_parameters(content, who)
    for name, default in (("rope_theta", words.rope_theta), ("partial_rotary_factor", words.partial_rotary_factor)):
        if {name} <= content.keys() & rope.keys() and content[name] != rope[name]:
            raise ModelError(
                f"{who}: {name} is {content[name]!r}, and {rope[name]!r} among the rope parameters: keep one of them"
            )
        value = rope.get(name, content.get(name, default))
        found[name] = None if value is None else check_number(value, name, who)
    if (found["partial_rotary_factor"] or 0) > 1:
        raise ModelError(f"{who}: partial_rotary_factor has to be at most 1; it is {found['partial_rotary_factor']}")
    scaling = {name: value for name, value in rope.items() if name not in _OTHERS}
    if kind == "su" or (kind == "yarn" and "short_factor" in scaling):  # in the first files of Phi-3
        kind = "longrope"
    check_scaling(kind, scaling, who, words.scaled_rotary)
    length, longest = scaling.pop(LENGTH, None), content.get("max_position_embeddings")
    if kind == "default" or (kind in _PADDLE_NAMES and scaling["factor"] == 1):
        return found
    if kind == "dynamic" and length not in (None, longest):
        raise ModelError(
            f"{who}: dynamic rope_scaling from {length} positions, where max_position_embeddings says {longest}: "
            "transformers reads only the latter"
        )
    if kind not in _PADDLE_NAMES:
        beside = content.get(LENGTH, words.fields.get(LENGTH))
        if beside is not None and length not in (None, beside):
            raise ModelError(f"{who}: {LENGTH} is {beside}, and {length} in rope_scaling: keep one of them")
        if (length := beside or length) is not None:
            scaling[LENGTH] = length
    found["rope_scaling"] = {"rope_type": kind, **scaling}
    return found


def convert_rope_from_hf(content: Mapping[str, Any], kinds: frozenset[str], who: str) -> dict[str, Any]:
    """Make the fields of PaddleNLP's configuration.

    Args:
        content: of config.json, without nulls.
        kinds: HFConfig.scaled_rotary.
        who: file and family, for messages.

    Raises:
        ModelError: for what the model does not compute.
    """
    found = read_rope_fields(content, HFConfig({}, scaled_rotary=kinds - {"ntk"}), who)
    if found.pop("partial_rotary_factor") not in (None, 1):
        raise ModelError(f"{who} has no partial_rotary_factor")
    if "rope_scaling" not in found:
        return found
    kind, factor = found["rope_scaling"]["rope_type"], found["rope_scaling"].get("factor")
    if content.get("rope_scaling_type") is not None:
        raise ModelError(f"{who}: rope_scaling of type {kind!r} and rope_scaling_type: keep one of them")
    if "ntk" in kinds and kind in _PADDLE_NAMES:
        return {
            "rope_theta": found["rope_theta"],
            "rope_scaling_type": _PADDLE_NAMES[kind],
            "rope_scaling_factor": factor,
        }
    return found


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


def convert_rope_to_hf(config: Any, kinds: frozenset[str], head_size: int) -> dict[str, Any]:
    """Make rope_theta and rope_scaling.

    "ntk" only changes the base, so it becomes another base. PaddleNLP then also computes more positions.

    Args:
        config: PaddleNLP's.
        kinds: HFConfig.scaled_rotary.
        head_size: of queries and keys.

    Raises:
        ModelError: for a scaling that the model does not compute, or that has wrong numbers.
    """
    rope = read_rope(config, head_size)
    check_scaling(rope.kind, rope.scaling, config.model_type, kinds)
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.kind == "ntk":
        factor = rope.scaling["factor"]
        return {
            "rope_theta": rope.theta * factor ** (head_size / (head_size - 2)),
            "rope_scaling": None,
            "max_position_embeddings": round(config.max_position_embeddings * factor),
        }
    return {"rope_theta": rope.theta, "rope_scaling": {"rope_type": rope.kind, **rope.scaling}}
