"""When the fused operators can replace those of Paddle and PaddleNLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle

from oarlock.environment.console import log_once

Function = Callable[..., Any]


def is_as_made(layer: Any) -> bool:
    """Whether a layer's forward is its class's, and nothing looks into its calls (stage 3 gathers weights before them,
    QLoRA gives layers a forward of their own)."""
    return not (layer._forward_pre_hooks or layer._forward_post_hooks or "forward" in vars(layer))


def fits(*tensors: Any) -> bool:
    """Whether the fused operators serve these: all float32 on the CPU."""
    for tensor in tensors:
        if tensor.dtype != paddle.float32 or not tensor.place.is_cpu_place():
            log_once(f"the fused CPU ops are for float32; {tensor.dtype} goes through Paddle's own")
            return False
    return True
