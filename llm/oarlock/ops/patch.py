"""When the fused operators are used in place of Paddle's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle

from oarlock.environment.console import log_once

Function = Callable[..., Any]


def is_unmodified(layer: Any) -> bool:
    """Whether a layer has its class's forward and no hooks.

    Sharding stage 3 gathers weights in hooks, and QLoRA replaces the forward of single layers.
    """
    return not (layer._forward_pre_hooks or layer._forward_post_hooks or "forward" in vars(layer))


_is_enabled = False


def enable(wanted: bool) -> None:
    """Let the decoder use the fused CPU operators, or not (oarlock.ops.install decides)."""
    global _is_enabled
    _is_enabled = wanted


def can_fuse(*tensors: Any) -> bool:
    """Whether the fused CPU operators are in use and support these tensors. Not in static graphs."""
    return _is_enabled and paddle.in_dynamic_mode() and fits(*tensors)


def fits(*tensors: Any) -> bool:
    """Whether the fused operators support these tensors: all float32, on the CPU."""
    for tensor in tensors:
        if tensor.dtype != paddle.float32 or not tensor.place.is_cpu_place():
            log_once(f"the fused CPU ops support float32 only; {tensor.dtype} uses Paddle's ops")
            return False
    return True
