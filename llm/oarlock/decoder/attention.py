"""Self-attention with grouped heads, and the context that all layers of a forward pass share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import nn
from paddle.distributed.fleet.utils import recompute

from oarlock.decoder.linear import make_linear, set_slice
from oarlock.decoder.norm import RMSNorm, SplitRMSNorm
from oarlock.decoder.rotary import rotate
from oarlock.families.architecture import Architecture, Attention
from oarlock.ops.attention import AttentionMask, attend
from oarlock.ops.lora_linear import project
from oarlock.typing import Tensor

KeysAndValues = tuple[Tensor, Tensor]  # a layer's KV cache: [batch, keys, kv_heads, head_dim] each


@dataclass(frozen=True)
class LayerContext:
    """The inputs of a forward pass that all layers get.

    Attributes:
        positions: int64 [batch, tokens]; None: 0, 1, ... in every row.
        mask: which keys each token attends to.
        seq_length: tokens of a row in this call. Sequence parallelism flattens the batch, so shapes do not show it.
        kv_length: tokens of a row including those of earlier calls, which the KV cache holds.
        use_cache: return keys and values.
        token_mask: bool [batch, tokens], False for padding, which does not count as load of the experts; None: there is
            no padding.
    """

    positions: Tensor | None
    mask: AttentionMask
    seq_length: int
    kv_length: int
    use_cache: bool = False
    token_mask: Tensor | None = None


class SelfAttention(nn.Layer):
    """Multi-head attention of one layer: this tensor-parallel rank's heads."""

    def __init__(self, spec: Attention, arch: Architecture, config: Any) -> None:
        super().__init__()
        degree = config.tensor_parallel_degree
        self.spec, self.config = spec, config
        self.heads, self.kv_heads = spec.heads // degree, spec.kv_heads // degree
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        if spec.packed:
            sizes = (queries, keys, keys) if spec.packed == "blocks" else queries + 2 * keys
            self.qkv_proj = make_linear(arch.hidden, sizes, config, split="column", bias=spec.qkv_bias)
        else:
            self.q_proj = make_linear(arch.hidden, queries, config, split="column", bias=spec.qkv_bias)
            self.k_proj = make_linear(arch.hidden, keys, config, split="column", bias=spec.qkv_bias)
            self.v_proj = make_linear(arch.hidden, keys, config, split="column", bias=spec.qkv_bias)
        self.o_proj = make_linear(queries, arch.hidden, config, split="row", bias=spec.output_bias)
        if spec.qk_norm:
            self.q_norm, self.k_norm = (self._make_norm(width, arch) for width in (queries, keys))
        if spec.sinks:
            self.sinks = self.create_parameter([self.heads], default_initializer=nn.initializer.Constant(0.0))
            if degree > 1:
                set_slice(self.sinks, (spec.heads,), 0, config)
        self.enable_recompute = False  # set by PretrainedModel.recompute_enable()

    def _make_norm(self, width: int, arch: Architecture) -> nn.Layer:
        """The RMSNorm of queries or keys; `width` is that of all heads."""
        if self.spec.qk_norm == "all_heads" and self.config.tensor_parallel_degree > 1:
            return SplitRMSNorm(width, arch.norm_epsilon, self.config)
        width = self.spec.head_dim if self.spec.qk_norm == "head" else width
        return RMSNorm(width, arch.norm_epsilon, self.config, arch.norm_offset, is_per_head=True)

    @property
    def output_projection(self) -> nn.Layer:
        """The last linear layer of the residual branch."""
        return self.o_proj

    def forward(
        self, x: Tensor, context: LayerContext, past: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues | None]:
        """[batch, tokens, hidden] -> the same shape, and the KV cache if the context asks for it.

        Under sequence parallelism [batch x tokens / ranks, hidden].
        """
        query, key, value = self._project_qkv(x)
        output, present = self.compute_attention(query, key, value, context, past)
        return project(output, self.o_proj)[0], present

    def _project_qkv(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values, [..., heads x head_dim] each."""
        if not self.spec.packed:
            return project(x, self.q_proj, self.k_proj, self.v_proj)
        (qkv,) = project(x, self.qkv_proj)
        size = self.spec.head_dim
        if self.spec.packed == "blocks":
            return list(qkv.split([self.heads * size, self.kv_heads * size, self.kv_heads * size], axis=-1))
        shape = [0] * (qkv.ndim - 1)
        groups = qkv.reshape([*shape, self.kv_heads, -1])
        parts = groups.split([self.heads // self.kv_heads * size, size, size], axis=-1)
        return [part.reshape([*shape, -1]) for part in parts]

    def compute_attention(
        self, query: Tensor, key: Tensor, value: Tensor, context: LayerContext, past: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues | None]:
        """Everything between the projections.

        Args:
            query, key, value: [batch, tokens, heads x head_dim], or [batch x tokens, heads x head_dim].

        Returns:
            The output in the shape of the query, and the KV cache.
        """
        spec, shape = self.spec, query.shape
        if spec.qk_norm == "all_heads":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (
            x.reshape([*([-1, context.seq_length] if x.ndim == 2 else [0, 0]), heads, spec.head_dim])
            for x, heads in ((query, self.heads), (key, self.kv_heads), (value, self.kv_heads))
        )
        if spec.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        if spec.rope is not None:
            query, key = rotate(query, key, spec.rope, context.positions, context.kv_length)
        sinks = self.sinks if spec.sinks else None
        output, present = attend_to_cache(
            self, query, key, value, context, past, window=spec.window, soft_cap=spec.soft_cap, sinks=sinks
        )
        return output.reshape([0, 0, -1] if len(shape) == 3 else [-1, shape[-1]]), present


def attend_to_cache(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, context: LayerContext, past: KeysAndValues | None,
    **options: Any,
) -> tuple[Tensor, KeysAndValues | None]:  # fmt: skip
    """Attend to the keys of earlier calls and of this one.

    Args:
        layer: an attention layer.
        query, key, value: [batch, tokens, heads, head_dim].
        past: the KV cache of earlier calls.
        options: further arguments of oarlock.ops.attention.attend.

    Returns:
        [batch, tokens, heads, head_dim of the values], and the new KV cache if the context asks for it.
    """
    if past is not None:
        key, value = paddle.concat([past[0], key], axis=1), paddle.concat([past[1], value], axis=1)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        dropout = layer.spec.dropout if layer.training else 0.0
        return attend(query, key, value, mask=context.mask, scale=layer.spec.scale, dropout=dropout, **options)

    output = run_part(layer, "core_attn", run, query, key, value)
    return output, (key, value) if context.use_cache else None


def should_recompute(layer: Any, part: str, x: Tensor) -> bool:
    """Whether the backward pass computes a part of a layer again, to save its activations.

    Args:
        part: a value of --recompute_granularity.
        x: the part's input.
    """
    return layer.enable_recompute and layer.config.recompute_granularity == part and not x.stop_gradient


def run_part(layer: Any, part: str, function: Callable[..., Any], x: Tensor, *others: Any) -> Any:
    """Run a part of a layer, and have the backward pass compute it again if should_recompute() says so."""
    if not should_recompute(layer, part, x):
        return function(x, *others)
    return recompute(function, x, *others, use_reentrant=layer.config.recompute_use_reentrant)
