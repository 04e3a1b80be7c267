"""Linear layers of one model layer made together, forward and backward (custom_ops/training_step/linear_paddle.cc).

Float32 on the CPU, through Paddle's MKL. `install` puts them behind PaddleNLP's names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import paddle

from oarlock.ops import library
from oarlock.ops.patch import Function, fits

Tensor = Any


def fused_projections(x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x query, x key, x value: their products sum the gradient of x as they make it.

    Args:
        x: [..., in]; query, key, value: weights [in, out], each with its out.

    Raises:
        ValueError: when shapes do not fit.
    """
    return tuple(library.run("fused_projections", x, query, key, value))


def fused_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(silu(x gate) * (x up)) down (https://arxiv.org/abs/2002.05202): [..., in] -> [..., out].

    The product of the two is made a second time in the backward, where it costs no memory traffic, and not kept.

    Args:
        gate, up: weights [in, inner]; down: [inner, out].

    Raises:
        ValueError: when shapes do not fit.
    """
    return library.run("fused_mlp", x, gate, up, down)[0]


def fused_lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """x weight + scaling * (x a) b: [..., in] -> [..., out]. No gradient for weight, which LoRA leaves as it is.

    Args:
        weight: [in, out]; a: [in, rank]; b: [rank, out].
    """
    # A custom operator is not told which gradients are wanted; x's is half of the work.
    return library.run("fused_lora_linear", x, weight, a, b, scaling, not x.stop_gradient)[0]


# Replacements of PaddleNLP's; see install.


def for_lora(original: Function) -> Function:
    """LoRALinear's forward where it is plain LoRA at work; its other forms keep their way."""

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        other = self.use_mora or self.lora_use_mixer or self.pissa or self.disable_lora or self.merged
        other = other or self.use_quick_lora or isinstance(self.lora_dropout, paddle.nn.Dropout)
        if other or not self.weight.stop_gradient or not fits(input, self.weight, self.lora_A, self.lora_B):
            return original(self, input, *args, **kwargs)
        result = fused_lora_linear(input, self.weight, self.lora_A, self.lora_B, self.scaling)
        return result if self.bias is None else result + self.bias

    return forward


def for_mlp(original: Function) -> Function:
    """LlamaMLP's and Qwen2MLP's forward."""

    def forward(self: Any, x: Tensor) -> Tensor:
        layers: list[Any] = [getattr(self, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        is_swiglu = getattr(self, "fuse_swiglu", True)  # Qwen2's may have another activation
        if not is_swiglu or not _together(x, layers) or any(layer.bias is not None for layer in layers):
            return original(self, x)
        return fused_mlp(x, *(layer.weight for layer in layers))

    return forward


def for_attention(original: Function) -> Function:
    """The forward of an attention layer: q_proj, k_proj and v_proj have their results when it calls them."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layers: list[Any] = [getattr(self, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        if not _together(hidden_states, layers):
            return original(self, hidden_states, *args, **kwargs)
        made = fused_projections(hidden_states, *(layer.weight for layer in layers))
        with _waiting(hidden_states, dict(zip(map(id, layers), made, strict=True))):
            return original(self, hidden_states, *args, **kwargs)

    return forward


def for_linear(original: Function) -> Function:
    """paddle.nn.Linear's forward, for those."""

    def forward(self: Any, input: Tensor) -> Tensor:
        made = _results.pop(id(self), None) if input is _input else None
        if made is None:
            return original(self, input)
        return made if self.bias is None else made + self.bias

    return forward


def _together(x: Tensor, layers: list[Any]) -> bool:
    """Whether these are plain linear layers in training, that nothing else looks into (stage 3 gathers weights so)."""
    if not (paddle.in_dynamic_mode() and paddle.is_grad_enabled()):
        return False
    for layer in layers:
        hooked = type(layer) is not paddle.nn.Linear or layer._forward_pre_hooks or layer._forward_post_hooks
        if hooked or layer.weight.stop_gradient:
            return False
    return fits(x, *(layer.weight for layer in layers))


_input: Tensor = None
_results: dict[int, Tensor] = {}  # of that input, by the layer that is about to be asked for them


@contextlib.contextmanager
def _waiting(given: Tensor, results: dict[int, Tensor]) -> Iterator[None]:
    global _input, _results
    before, (_input, _results) = (_input, _results), (given, results)
    try:
        yield
    finally:
        _input, _results = before
