"""Linear layers with LoRA, and several linear layers of a decoder layer computed together (custom_ops/lora_linear).

Float32 on the CPU, with the matrix products of Paddle's MKL. `install` replaces PaddleNLP's layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import paddle
from paddlenlp.peft.lora.lora_layers import LoRALinear

from oarlock.ops import library
from oarlock.ops.patch import Function, fits, is_as_made
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


# Replacements of PaddleNLP's forwards (see oarlock.compat.patches).


def for_lora(original: Function) -> Function:
    """Replace LoRALinear's forward for plain LoRA. Variants (rsLoRA mixers, MoRA, dropout) run as before."""

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = _result_of(self, input)
        if result is None:
            if not _adds_lora(self) or not fits(input, self.weight, self.lora_A, self.lora_B):
                return original(self, input, *args, **kwargs)
            result = fused_lora_linear(input, self.weight, self.lora_A, self.lora_B, self.scaling)
        return result if self.bias is None else result + self.bias

    return forward


def for_linear(original: Function) -> Function:
    """Replace paddle.nn.Linear's forward, so that it returns a result that was computed in advance."""

    def forward(self: Any, input: Tensor) -> Tensor:
        if self is _left_out:
            return input
        result = _result_of(self, input)
        if result is None:
            return original(self, input)
        return result if self.bias is None else result + self.bias

    return forward


def for_mlp(original: Function) -> Function:
    """Replace the forward of LlamaMLP and Qwen2MLP if all three layers have LoRA."""

    def forward(self: Any, x: Tensor) -> Tensor:
        is_swiglu = getattr(self, "fuse_swiglu", True)  # Qwen2's may have another activation
        layers = _with_lora(self, x, "gate_proj", "up_proj", "down_proj")
        if not is_swiglu or not layers or any(layer.bias is not None for layer in layers):
            return original(self, x)
        return fused_lora_mlp(x, _three(layers))

    return forward


def for_attention(original: Function) -> Function:
    """Replace the forward of an attention layer with LoRA: computes q_proj, k_proj and v_proj before it calls them."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layers = _with_lora(self, hidden_states, "q_proj", "k_proj", "v_proj")
        if not layers:
            return original(self, hidden_states, *args, **kwargs)
        with waiting(hidden_states, layers, fused_lora_projections(hidden_states, _three(layers))):
            return original(self, hidden_states, *args, **kwargs)

    return forward


def trained_whole(owner: Any, x: Tensor, *names: str) -> list[Any]:
    """Return the named layers if all are plain trained linear layers that can be computed together, else []."""
    layers = _alike(owner, names, lambda layer: type(layer) is paddle.nn.Linear and not layer.weight.stop_gradient)
    return layers if fits(x, *(layer.weight for layer in layers)) else []


def _with_lora(owner: Any, x: Tensor, *names: str) -> list[Any]:
    """Return the layers of these names if all have LoRA and can be computed together, else []."""
    layers = _alike(owner, names, _adds_lora)
    return layers if fits(x, *(each for layer in layers for each in (layer.weight, layer.lora_A, layer.lora_B))) else []


def _alike(owner: Any, names: Sequence[str], is_wanted: Callable[[Any], bool]) -> list[Any]:
    """Return the named layers if all pass `is_wanted`, have no hooks, and a backward will follow, else []."""
    layers: list[Any] = [owner._sub_layers.get(name) for name in names]  # getattr looks elsewhere first
    if not (paddle.in_dynamic_mode() and paddle.is_grad_enabled()):
        return []
    # is_as_made is checked first: QLoRA's layers have their own forward and no weight.
    return layers if all(layer is not None and is_as_made(layer) and is_wanted(layer) for layer in layers) else []


def _adds_lora(layer: Any) -> bool:
    """Whether a layer is plain LoRA with a frozen weight."""
    if type(layer) is not LoRALinear or not layer.weight.stop_gradient:
        return False
    other = layer.use_mora or layer.lora_use_mixer or layer.pissa or layer.disable_lora or layer.merged
    return not (other or layer.use_quick_lora or isinstance(layer.lora_dropout, paddle.nn.Dropout))


def _three(layers: list[Any]) -> LoraTriple:
    parts = zip(*((layer.weight, layer.lora_A, layer.lora_B, layer.scaling) for layer in layers), strict=True)
    return LoraTriple(*map(list, parts))


def _result_of(layer: Any, input: Tensor) -> Tensor | None:
    """Return the result that was computed for the layer in advance, without its bias, or None."""
    return _results.pop(id(layer), None) if input is _input else None


_input: Tensor = None
_results: dict[int, Tensor] = {}  # id of a layer -> its result for _input
_left_out: Any = None  # a layer that returns its input, because its product is computed later


@contextlib.contextmanager
def waiting(given: Tensor, layers: Sequence[Any], made: Sequence[Tensor], left_out: Any = None) -> Iterator[None]:
    """In the block, the layers return results computed in advance for an input, and `left_out` returns its input."""
    global _input, _results, _left_out
    before = _input, _results, _left_out
    _input, _results, _left_out = given, dict(zip(map(id, layers), made, strict=True)), left_out
    try:
        yield
    finally:
        _input, _results, _left_out = before
