"""A decoder layer in two operators, before and after its attention (custom_ops/decoder_layer).

Float32 on the CPU. Where these don't fit (LoRA, biases), the layer still adds the residuals in its fused norms.
"""

from __future__ import annotations

import inspect
from typing import Any

import paddle

from oarlock.ops import library, lora_linear
from oarlock.ops.patch import Function, fits, is_as_made
from oarlock.ops.rms_norm import fused_add_rms_norm, fused_rms_norm_kept
from oarlock.typing import Tensor


def fused_layer_start(
    x: Tensor, scale: Tensor, query: Tensor, key: Tensor, value: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute query, key and value of RMSNorm(x).

    Args:
        x: [..., width]; scale: of the RMSNorm, [width]; query, key, value: weights [width, out], where out may differ.

    Returns:
        The three products; x for the residual, which shares the memory of x; RMSNorm(x), without a gradient.

    Raises:
        ValueError: if shapes don't fit.
    """
    return tuple(library.run("fused_layer_start", x, scale, query, key, value, epsilon)[:5])


def fused_layer_end(
    attended: Tensor, kept: Tensor, output: Tensor, scale: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    epsilon: float,
) -> Tensor:  # fmt: skip
    """Compute total + MLP(RMSNorm(total)) with total = kept + attended output: [..., width].

    Args:
        attended: [..., heads x dim]; kept: [..., width]; output: weight [heads x dim, width].
        scale: of the RMSNorm, [width]; gate, up: weights [width, inner]; down: [inner, width].

    Raises:
        ValueError: if shapes don't fit.
    """
    return library.run("fused_layer_end", attended, kept, output, scale, gate, up, down, epsilon)[0]


def for_layer(original: Function) -> Function:
    """Replace the forward of LlamaDecoderLayer and Qwen2DecoderLayer in training, if only the output is returned."""
    names = [name for name in inspect.signature(original).parameters if name not in ("self", "hidden_states", "kwargs")]

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs  # the attention has the same argument names
        norms = self.input_layernorm, self.post_attention_layernorm
        can_fuse = (
            _is_plain(self, given)
            and given.keys() <= set(names)
            and all(is_as_made(norm) and hasattr(norm, "variance_epsilon") for norm in norms)
            and fits(hidden_states, *(norm.weight for norm in norms))
        )
        if not can_fuse:
            return original(self, hidden_states, *args, **kwargs)
        first, second = norms
        whole = _whole(self, hidden_states)
        if not whole:  # only the norms and the sums are fused
            normed, kept = fused_rms_norm_kept(hidden_states, first.weight, first.variance_epsilon)
            attended = _alone(self.self_attn(normed, **given))
            normed, total, _ = fused_add_rms_norm(attended, kept, second.weight, second.variance_epsilon)
            return total + self.mlp(normed)
        query, key, value, output, gate, up, down = (linear.weight for linear in whole)
        *made, kept, normed = fused_layer_start(hidden_states, first.weight, query, key, value, first.variance_epsilon)
        with lora_linear.waiting(normed, whole[:3], made, left_out=whole[3]):
            attended = _alone(self.self_attn(normed, **given))
        return fused_layer_end(attended, kept, output, second.weight, gate, up, down, second.variance_epsilon)

    return forward


def _alone(outputs: Any) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _whole(layer: Any, x: Tensor) -> list[Any]:
    """Return the linear layers if all are trained without LoRA and only query, key and value have biases, else []."""
    attention, mlp = layer.self_attn, layer.mlp
    in_attention = lora_linear.trained_whole(attention, x, "q_proj", "k_proj", "v_proj", "o_proj")
    in_mlp = lora_linear.trained_whole(mlp, x, "gate_proj", "up_proj", "down_proj")
    if not (in_attention and in_mlp and is_as_made(attention) and is_as_made(mlp)):
        return []
    others = in_attention[3:] + in_mlp
    if not getattr(mlp, "fuse_swiglu", True) or any(linear.bias is not None for linear in others):
        return []
    return in_attention + in_mlp


def _is_plain(layer: Any, given: dict[str, Any]) -> bool:
    if not (paddle.in_dynamic_mode() and paddle.is_grad_enabled()):
        return False
    recomputes = layer.enable_recompute and layer.layerwise_recompute and layer.recompute_granularity == "full_attn"
    asks = given.get("output_attentions") or given.get("use_cache") or given.get("past_key_value") is not None
    return not (recomputes or asks)
