"""Operators of Paddle that compute something wrong, put right behind their own names.

Each entry of CORRECTIONS was written for Paddle 3.3.1; tests/parity/test_frozen_operators.py shows what is wrong
without it, and fails itself when a newer Paddle no longer needs it.
"""

from __future__ import annotations

from typing import Any

import paddle

from oarlock.ops.patch import Function, Patch
from oarlock.typing import Tensor


def _layer_norm(original: Function) -> Function:
    """layer_norm whose gradient for x does not hang on whether the weight is trained.

    The CPU kernel (phi/kernels/cpu/layer_norm_grad_kernel.cc) multiplies with the weight only where the weight's own
    gradient is wanted too. A view of a frozen weight that wants one is of the same memory; its gradient goes nowhere.
    """

    def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        eager = paddle.in_dynamic_mode() and paddle.is_grad_enabled()
        if eager and weight is not None and weight.stop_gradient and not x.stop_gradient and x.place.is_cpu_place():
            weight = weight.detach()
            weight.stop_gradient = False
        return original(x, weight, bias, *args, **kwargs)

    return layer_norm


# paddle._C_ops is what all of Paddle's Python calls: nn.LayerNorm and nn.functional.layer_norm alike.
CORRECTIONS = (Patch("paddle._C_ops", "layer_norm", _layer_norm),)
_originals: dict[str, Function] = {}


def install() -> None:
    """Put them in place for a CPU, once in a process, before a model is trained. A GPU's kernels need none."""
    if _originals or paddle.get_device() != "cpu":
        return
    for patch in CORRECTIONS:
        owner = patch.find()
        _originals[patch.name] = getattr(owner, patch.name)
        setattr(owner, patch.name, patch.make(_originals[patch.name]))


def uninstall() -> None:
    """Put Paddle's own back."""
    for patch in CORRECTIONS:
        if patch.name in _originals:
            setattr(patch.find(), patch.name, _originals.pop(patch.name))
