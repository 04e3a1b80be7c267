"""The gated feed-forward (SwiGLU and its relatives, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from paddle import nn
from paddle.incubate.nn.functional import swiglu
from paddle.nn import functional

from oarlock.decoder.linear import make_linear
from oarlock.families.architecture import MLP
from oarlock.ops.lora_linear import project, try_lora_mlp
from oarlock.ops.patch import can_fuse
from oarlock.ops.swiglu import fused_swiglu
from oarlock.typing import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate=True),
    "gelu_new": partial(functional.gelu, approximate=True),
    "relu": functional.relu,
    "quick_gelu": lambda x: x * functional.sigmoid(1.702 * x),
}


class GatedMLP(nn.Layer):
    """(activation(x gate) * (x up)) down. A tensor-parallel rank has a part of the intermediate features."""

    def __init__(self, spec: MLP, hidden: int, config: Any) -> None:
        super().__init__()
        self.spec = spec
        gate, up, down = spec.names
        width = spec.intermediate
        if spec.packed:
            self.add_sublayer(gate, make_linear(hidden, (width, width), config, split="column", bias=spec.bias))
        else:
            self.add_sublayer(gate, make_linear(hidden, width, config, split="column", bias=spec.bias))
            self.add_sublayer(up, make_linear(hidden, width, config, split="column", bias=spec.bias))
        self.add_sublayer(down, make_linear(width, hidden, config, split="row", bias=spec.bias))

    @property
    def output_projection(self) -> nn.Layer:
        """The last linear layer of the residual branch."""
        return self._sub_layers[self.spec.names[2]]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        is_silu = self.spec.activation in ("silu", "swish")
        *before, down = self._sub_layers.values()
        if is_silu and not self.spec.packed and (output := try_lora_mlp(x, before[0], before[1], down)) is not None:
            return output
        projected = project(x, *before)
        if is_silu and can_fuse(*projected):
            inner = fused_swiglu(*projected)
        else:
            gate, up = projected[0].chunk(2, axis=-1) if self.spec.packed else projected
            # swiglu() keeps two tensors for the backward pass, the product of silu() three.
            inner = swiglu(gate, up) if is_silu else ACTIVATIONS[self.spec.activation](gate) * up
        return project(inner, down)[0]
