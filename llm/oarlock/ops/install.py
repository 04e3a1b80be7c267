"""Turns the fused CPU operators on and off.

Our decoder and the loss call them where oarlock.ops.patch.can_fuse says so. Only AdamW's is behind a name of Paddle
(oarlock.compat.patches); it calls the original for what it does not support.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import paddle

from oarlock.compat.patch import AppliedPatches
from oarlock.compat.patches import list_patches
from oarlock.environment.console import log_once
from oarlock.ops import library
from oarlock.ops.adamw import fused_adamw
from oarlock.ops.malloc import keep_freed_memory
from oarlock.ops.patch import Function, enable, fits
from oarlock.ops.self_check import check_attention, check_norms, check_training_ops


def replace_adamw(original: Function) -> Function:
    """AdamW's pass over its parameters: those it would update one by one are updated together."""

    def _create_optimization_pass(self: Any, parameters_and_grads: Any, *args: Any, **kwargs: Any) -> Any:
        exact = type(self) is paddle.optimizer.AdamW and not (self._amsgrad or self._lazy_mode)
        if not exact or not isinstance(parameters_and_grads, list):
            return original(self, parameters_and_grads, *args, **kwargs)
        pairs = [(p, g) for p, g in parameters_and_grads if g is not None]
        if not all(g.is_dense() and fits(p, g) for p, g in pairs):
            return original(self, parameters_and_grads, *args, **kwargs)
        pairs.clear()
        self._append_optimize_op = lambda block, pair: pairs.append(pair)
        try:
            result = original(self, parameters_and_grads, *args, **kwargs)
        finally:
            del self._append_optimize_op
        fused_adamw(self, pairs)
        return result

    return _create_optimization_pass


PATCHES = list_patches(__name__)
_applied = AppliedPatches()


def use(wanted: bool) -> None:
    """install(), or uninstall() what an earlier run in this process put in place."""
    if wanted:
        install()
    else:
        uninstall()


def install() -> bool:
    """Put the fused operators in place, once in a process, before models are built.

    Returns:
        Whether they are in place; where they are not built, that is said once and nothing changes.

    Raises:
        EnvironmentProblem: when they do not compute what the reference does.
    """
    if _applied:
        return True
    if not library.usable():
        return False
    if not library.has_products():
        log_once(
            "this Paddle is without MKL, which the fused ops call; Paddle's own ops are used (same result, slower)"
        )
        return False
    library.load()
    check_norms()
    check_training_ops()
    check_attention()
    keep_freed_memory()
    _applied.apply(PATCHES)
    enable(True)
    return True


def uninstall() -> None:
    """Put the originals back."""
    _applied.restore()
    enable(False)


@contextlib.contextmanager
def originals() -> Iterator[None]:
    """Paddle's own operators, inside."""
    were_used = bool(_applied)
    uninstall()
    try:
        yield
    finally:
        use(were_used)
