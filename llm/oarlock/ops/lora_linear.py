"""Linear layers with LoRA, and several linear layers of one input computed together (custom_ops/lora_linear).

Float32 on the CPU, with the matrix products of Paddle's MKL. project() is how a decoder calls its linear layers: the
operators run where they fit, and the layers themselves elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import paddle
from paddlenlp.peft.lora.lora_layers import LoRALinear

from oarlock.ops import library
from oarlock.ops.patch import can_fuse, is_unmodified
from oarlock.typing import Tensor


def fused_lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Compute x weight + scaling * (x a) b: [..., in] -> [..., out]. The weight is frozen and gets no gradient.

    Args:
        weight: [in, out]; a: [in, rank]; b: [rank, out].

    Raises:
        ValueError: if shapes don't fit.
    """
    # A custom operator doesn't know which gradients are wanted. The gradient of x is half of the work.
    return library.run("fused_lora_linear", x, weight, a, b, scaling, not x.stop_gradient)[0]


@dataclass(frozen=True)
class LoraTriple:
    """The arguments of fused_lora_linear for three linear layers."""

    weights: Sequence[Tensor]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scalings: Sequence[float]

    def run(self, operator: str, x: Tensor) -> list[Tensor]:
        """Run an operator on x and the three layers."""
        given = (list(part) for part in (self.weights, self.a, self.b, self.scalings))
        return library.run(operator, x, *given, not x.stop_gradient)


def fused_lora_projections(x: Tensor, layers: LoraTriple) -> tuple[Tensor, Tensor, Tensor]:
    """Compute query, key and value of x [..., in]. Their products accumulate the gradient of x."""
    return tuple(layers.run("fused_lora_projections", x)[:3])


def fused_lora_mlp(x: Tensor, layers: LoraTriple) -> Tensor:
    """Compute (silu(x gate) * (x up)) down (https://arxiv.org/abs/2002.05202): [..., in] -> [..., out].

    silu(x gate) * (x up) is recomputed in the backward, where it costs no memory traffic, and not stored.

    Args:
        layers: gate, up, down.
    """
    return layers.run("fused_lora_mlp", x)[0]


def project(x: Tensor, *layers: Any) -> list[Tensor]:
    """Compute linear layers of one input: [layer(x) for layer in layers], with the fused operators where they fit."""
    fused = [_adds_lora(layer, x) for layer in layers]
    if not any(fused):  # (Paddle can't translate a zip with `strict` into a static graph.)
        return [layer(x) for layer in layers]
    if all(fused) and len(layers) == 3 and paddle.is_grad_enabled():  # their products accumulate the gradient of x
        found = list(fused_lora_projections(x, _triple(layers)))
    else:
        found = [
            fused_lora_linear(x, one.weight, one.lora_A, one.lora_B, one.scaling) if fused[i] else one(x)
            for i, one in enumerate(layers)  # Paddle's conversion to static graphs knows no strict zip
        ]
    return [
        found[i] + layer.bias if fused[i] and layer.bias is not None else found[i] for i, layer in enumerate(layers)
    ]


def try_lora_mlp(x: Tensor, gate: Any, up: Any, down: Any) -> Tensor | None:
    """Compute fused_lora_mlp from three layers, or return None where it does not fit or saves nothing (inference)."""
    layers = (gate, up, down)
    if not paddle.is_grad_enabled() or not all(_adds_lora(one, x) and one.bias is None for one in layers):
        return None
    return fused_lora_mlp(x, _triple(layers))


def _adds_lora(layer: Any, x: Tensor) -> bool:
    """Whether a layer is plain LoRA with a frozen weight, and has no hooks. Variants (MoRA, dropout) are not."""
    # is_unmodified comes first: QLoRA's layers have their own forward and no weight.
    if type(layer) is not LoRALinear or not is_unmodified(layer) or not layer.weight.stop_gradient:
        return False
    other = layer.use_mora or layer.lora_use_mixer or layer.pissa or layer.disable_lora or layer.merged
    if other or layer.use_quick_lora or isinstance(layer.lora_dropout, paddle.nn.Dropout):
        return False
    return can_fuse(x, layer.weight, layer.lora_A, layer.lora_B)


def _triple(layers: Sequence[Any]) -> LoraTriple:
    parts = zip(*((layer.weight, layer.lora_A, layer.lora_B, layer.scaling) for layer in layers), strict=True)
    return LoraTriple(*map(list, parts))
