"""Replacing the forward of a PaddleNLP model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

NamedArguments = dict[str, Any]


def bind_arguments(forward: Callable[..., Any]) -> tuple[Callable[..., NamedArguments], str]:
    """Return a function that names the arguments of a call of `forward`, and the name of its KV cache argument."""
    signature = inspect.signature(forward)
    past = "past_key_values" if "past_key_values" in signature.parameters else "cache"

    def name(*args: Any, **kwargs: Any) -> NamedArguments:
        bound = signature.bind(*args, **kwargs).arguments
        return {**bound, **bound.pop("kwargs", {})}

    return name, past


def set_forward(model: Any, forward: Callable[..., Any]) -> None:
    """Replace a model's forward.

    PretrainedModel.__setattr__ would take `forward` for a function that expects the model as its first argument.
    """
    object.__setattr__(model, "forward", forward)
