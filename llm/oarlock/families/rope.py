"""Reads the rotary embedding of a configuration, and checks the numbers of its scaling."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from oarlock.errors import ModelError
from oarlock.families.architecture import Rope

LENGTH = "original_max_position_embeddings"  # in Phi-3, next to the other numbers
_MAY_BE_0 = ("mscale", "mscale_all_dim")  # which means that there is none
_LISTS = ("short_factor", "long_factor")
# The numbers of each kind of scaling, by transformers' names: those that it needs, and others that it reads.
_NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ("factor", LENGTH)),
    "linear": (("factor",), (LENGTH,)),
    "ntk": (("factor",), ()),
    "dynamic": (("factor",), (LENGTH,)),
    "yarn": (
        ("factor",),
        (LENGTH, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", LENGTH), ()),
    "longrope": (_LISTS, (LENGTH, "factor", "attention_factor")),
}
# Those that transformers has too; "ntk" is PaddleNLP's.
SCALED_ROTARY = frozenset(_NUMBERS) - {"default", "ntk"}
_PADDLE_KINDS = {"linear": "linear", "ntk": "ntk", "dynamic_ntk": "dynamic"}
_SMALLEST, _LARGEST = 1e-6, 1e12


def read_rope(config: Any, dim: int) -> Rope:
    """Read the rotary embedding of a model.

    Args:
        config: PaddleNLP's, with rope_scaling_type and rope_scaling_factor, or any with rope_scaling in transformers'
            form. rope_theta is the base in either.
        dim: rotated components of a head.

    Raises:
        ModelError: for numbers that are missing or wrong, naming them.
    """
    scaling = dict(getattr(config, "rope_scaling", None) or {})
    named = getattr(config, "rope_scaling_type", None)
    kind = scaling.pop("rope_type", "default")
    if named is not None and scaling:
        raise ModelError(f"rope_scaling of type {kind!r} and rope_scaling_type: keep one of them")
    if named is not None:
        kind, scaling = _PADDLE_KINDS.get(named, named), {"factor": config.rope_scaling_factor}
    check_scaling(kind, scaling, config.model_type)
    theta = float(getattr(config, "rope_theta", None) or 10000.0)
    if theta <= 1:
        raise ModelError(f"rope_theta has to be above 1; it is {theta}")
    if dim % 2 or dim < (4 if kind in ("ntk", "dynamic") else 2):
        raise ModelError(f"{dim} components of a head can't be rotated with rope_scaling of type {kind!r}")
    for name in _LISTS:
        if name in scaling and len(scaling[name]) != dim // 2:
            raise ModelError(
                f"rope_scaling: {name} has {len(scaling[name])} numbers; {dim // 2} frequencies need one each"
            )
    return Rope(theta, dim, config.max_position_embeddings, kind, scaling)


def check_scaling(kind: str, scaling: Mapping[str, Any], who: str, kinds: Collection[str] = tuple(_NUMBERS)) -> None:
    """Check the numbers of a kind of scaling.

    Args:
        who: file and model, for messages.
        kinds: those that the model computes besides default.

    Raises:
        ModelError: for another kind, or naming a number that is missing, unknown or out of range.
    """
    if kind not in ("default", *kinds):
        raise ModelError(f"{who} does not know rope_scaling of type {kind!r} (it knows: {', '.join(sorted(kinds))})")
    needed, others = _NUMBERS[kind]
    if unread := sorted(set(scaling) - {*needed, *others}):
        raise ModelError(f"{who} does not know {', '.join(unread)} in rope_scaling of type {kind!r}")
    if missing := [name for name in needed if name not in scaling]:
        raise ModelError(f"{who}: rope_scaling of type {kind} lacks {', '.join(missing)}")
    for name, value in scaling.items():
        if name == "truncate":
            if not isinstance(value, bool):
                raise ModelError(f"{who}: truncate has to be true or false; it is {value!r}")
        elif name in _LISTS:
            if not isinstance(value, (list, tuple)) or not value:
                raise ModelError(f"{who}: {name} has to be a list of numbers")
            for number in value:
                check_number(number, f"a number of {name}", who)
        elif name not in _MAY_BE_0 or value != 0:
            check_number(value, name, who)
    for smaller, larger in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        numbers = scaling.get(smaller, 1), scaling.get(larger, 32)
        if numbers[0] >= numbers[1]:
            raise ModelError(f"{who}: {larger} has to be above {smaller}; they are {numbers[1]} and {numbers[0]}")
    if scaling.get(LENGTH, 2) < 2:
        raise ModelError(f"{who}: {LENGTH} has to be above 1; it is {scaling[LENGTH]}")


def check_number(value: Any, name: str, who: str) -> float:
    """Return a number that float32 can compute with.

    Raises:
        ModelError: for anything else.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not _SMALLEST <= value <= _LARGEST:  # NaN too
        shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:37] + "..."
        raise ModelError(f"{who}: {name} has to be a number from {_SMALLEST:g} to {_LARGEST:g}; it is {shown}")
    return value
