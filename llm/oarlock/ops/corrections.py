"""Operators of Paddle that compute something wrong, corrected.

The table is oarlock.compat.patches. tests/parity/test_frozen_operators.py shows what is wrong without each correction,
and fails when a newer Paddle no longer needs it.
"""

from __future__ import annotations

from typing import Any

import paddle

from oarlock.compat.patch import AppliedPatches
from oarlock.compat.patches import list_patches
from oarlock.ops.patch import Function

Tensor = Any


def correct_layer_norm(original: Function) -> Function:
    """Make the gradient of x in layer_norm independent of whether the weight is trained.

    The CPU kernel (phi/kernels/cpu/layer_norm_grad_kernel.cc) multiplies with the weight only if the weight needs a
    gradient too. For a frozen weight the replacement passes a detached view that asks for one; nothing uses it.
    """

    def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        eager = paddle.in_dynamic_mode() and paddle.is_grad_enabled()
        if eager and weight is not None and weight.stop_gradient and not x.stop_gradient and x.place.is_cpu_place():
            weight = weight.detach()
            weight.stop_gradient = False
        return original(x, weight, bias, *args, **kwargs)

    return layer_norm


# They patch paddle._C_ops, which nn.LayerNorm and nn.functional.layer_norm both call.
CORRECTIONS = list_patches(__name__)
_applied = AppliedPatches()


def install() -> None:
    """Apply the corrections on a CPU, once per process, before a model is trained. GPU kernels need none."""
    if not _applied and paddle.get_device() == "cpu":
        _applied.apply(CORRECTIONS)


def uninstall() -> None:
    """Restore Paddle's operators."""
    _applied.restore()
