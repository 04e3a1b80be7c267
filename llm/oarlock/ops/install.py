"""Replacing operators of Paddle and PaddleNLP by the fused CPU operators.

The table is oarlock.compat.patches. Each function here makes a replacement from the original. The replacement calls the
original where `fits` says no: for other devices, types and modes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import paddle
from paddle.distributed import collective, fleet

from oarlock.compat.patch import AppliedPatches
from oarlock.compat.patches import list_patches
from oarlock.environment.console import log_once
from oarlock.ops import library
from oarlock.ops.adamw import fused_adamw
from oarlock.ops.linear_cross_entropy import DeferredLogits
from oarlock.ops.malloc import keep_freed_memory
from oarlock.ops.patch import Function, fits
from oarlock.ops.rms_norm import fused_rms_norm
from oarlock.ops.rotary import fused_rotary
from oarlock.ops.self_check import check_attention, check_norms, check_training_ops
from oarlock.ops.swiglu import fused_swiglu
from oarlock.typing import Tensor


def replace_rms_norm(original: Function) -> Function:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not fits(hidden_states, self.weight):
            return original(self, hidden_states)
        return fused_rms_norm(hidden_states, self.weight, self.variance_epsilon)[0]

    return forward


def replace_rotary(original: Function) -> Function:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> Any:
        if not fits(q, k, cos, sin):
            return original(q, k, cos, sin, position_ids)
        return fused_rotary(q, k, cos, sin, position_ids)

    return apply_rotary_pos_emb


def replace_swiglu(original: Function) -> Function:
    def swiglu(x: Tensor, y: Tensor | None = None) -> Tensor:
        return fused_swiglu(x, y) if fits(x) else original(x, y)

    return swiglu


def replace_head(original: Function) -> Function:
    """Make heads that defer_logits() marked return DeferredLogits in training."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _is_deferring
        _is_deferring = getattr(self, _DEFERS, False) and self.training and paddle.is_grad_enabled()
        try:
            return original(self, *args, **kwargs)
        finally:
            _is_deferring = False

    return forward


def replace_parallel_matmul(original: Function) -> Function:
    """Return DeferredLogits in place of the product, while such a head runs."""

    def parallel_matmul(x: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _is_deferring or not fits(x, y):
            return original(x, y, *args, **kwargs)
        if not y.is_distributed:
            return DeferredLogits(x, y, kwargs["transpose_y"])  # both heads pass it by name
        if not kwargs["tensor_parallel_output"]:
            return original(x, y, *args, **kwargs)
        group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
        return DeferredLogits(collective._c_identity(x, group=group), y, kwargs["transpose_y"], group)

    return parallel_matmul


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


_DEFERS = "oarlock_defers_logits"
_is_deferring = False  # while such a head's forward runs
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
    return True


def uninstall() -> None:
    """Put the originals back."""
    _applied.restore()


@contextlib.contextmanager
def originals() -> Iterator[None]:
    """Paddle's and PaddleNLP's own operators, inside."""
    were_used = bool(_applied)
    uninstall()
    try:
        yield
    finally:
        use(were_used)


def defer_logits(model: paddle.nn.Layer) -> None:
    """Have the model's head give DeferredLogits in training, for a loss that knows them."""
    heads = tuple(patch.owners()[0] for patch in PATCHES if patch.replacement == f"{__name__}:replace_head")
    for layer in model.sublayers(include_self=True):
        if isinstance(layer, heads):
            setattr(layer, _DEFERS, True)
