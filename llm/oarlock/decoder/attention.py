"""Self-attention with grouped heads, and the context of a forward pass that all layers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import paddle
from paddle import nn
from paddle.distributed.fleet.utils import recompute

from oarlock.decoder.linear import find_runs, make_linear
from oarlock.decoder.norm import RMSNorm, SplitRMSNorm, rms_norm, sum_gradient_over_heads
from oarlock.decoder.rotary import rotate
from oarlock.families.architecture import Architecture, Attention
from oarlock.ops.attention import AttentionMask, attend
from oarlock.ops.lora_linear import project
from oarlock.typing import Tensor
from oarlock.weights.tensor_slice import TensorSlice

KeysAndValues = tuple[Tensor, Tensor]  # [batch, keys, heads, size of a head] each


@dataclass(frozen=True)
class ForwardContext:
    """The inputs of a forward pass that all layers share.

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
    """Attention of one layer: this tensor-parallel rank's heads."""

    def __init__(self, spec: Attention, model: Architecture, config: Any) -> None:
        super().__init__()
        degree, rank = config.tensor_parallel_degree, config.tensor_parallel_rank
        self.spec, self.config = spec, config
        self.heads, self.kv_heads = spec.heads // degree, spec.kv_heads // degree
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        if spec.packed:
            sizes = (queries, keys, keys) if spec.packed == "blocks" else queries + 2 * keys
            self.qkv_proj = make_linear(model.hidden, sizes, config, split="column", bias=spec.qkv_bias)
        else:
            self.q_proj = make_linear(model.hidden, queries, config, split="column", bias=spec.qkv_bias)
            self.k_proj = make_linear(model.hidden, keys, config, split="column", bias=spec.qkv_bias)
            self.v_proj = make_linear(model.hidden, keys, config, split="column", bias=spec.qkv_bias)
        self.o_proj = make_linear(queries, model.hidden, config, split="row", bias=spec.output_bias)
        if spec.qk_norm == "head":
            self.q_norm, self.k_norm = (
                RMSNorm(spec.head_dim, model.norm_epsilon, config, model.norm_offset, follows_sequence=False)
                for _ in range(2)
            )
        elif spec.qk_norm:
            self.q_norm, self.k_norm = (_norm_of_all_heads(size, model, config) for size in (queries, keys))
        if spec.sinks:
            self.sinks = self.create_parameter([self.heads], default_initializer=nn.initializer.Constant(0.0))
            if degree > 1:
                self.sinks.is_distributed = True
                self.sinks.tensor_slice = TensorSlice((spec.heads,), 0, find_runs((spec.heads,), degree, rank))
        self.enable_recompute = False  # set by PretrainedModel.recompute_enable()

    @property
    def output_projection(self) -> nn.Layer:
        """The last matrix of the residual branch."""
        return self.o_proj

    def forward(
        self, x: Tensor, context: ForwardContext, past: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues | None]:
        """[batch, tokens, hidden] -> the same shape, and keys and values if `given` asks for them.

        Under sequence parallelism [batch x tokens / ranks, hidden].
        """
        query, key, value = self.project_heads(x)
        attended, present = self.attend(query, key, value, context, past)
        return project(attended, self.o_proj)[0], present

    def project_heads(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values, [batch, tokens, heads x size of a head] each."""
        if not self.spec.packed:
            return project(x, self.q_proj, self.k_proj, self.v_proj)
        (mixed,) = project(x, self.qkv_proj)
        size = self.spec.head_dim
        if self.spec.packed == "blocks":
            return list(mixed.split([self.heads * size, self.kv_heads * size, self.kv_heads * size], axis=-1))
        shape = [0] * (mixed.ndim - 1)
        groups = mixed.reshape([*shape, self.kv_heads, -1])
        parts = groups.split([self.heads // self.kv_heads * size, size, size], axis=-1)
        return [part.reshape([*shape, -1]) for part in parts]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext, past: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues | None]:
        """The attended values, in the shape of the queries, and keys and values with those of earlier calls."""
        spec, shape = self.spec, query.shape
        if spec.qk_norm == "all_heads":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (
            states.reshape([*([-1, context.seq_length] if states.ndim == 2 else [0, 0]), heads, spec.head_dim])
            for states, heads in ((query, self.heads), (key, self.kv_heads), (value, self.kv_heads))
        )
        if spec.qk_norm == "head":
            query, key = self._norm_heads(query, self.q_norm), self._norm_heads(key, self.k_norm)
        if spec.rope is not None:
            query, key = rotate(query, key, spec.rope, context.positions, context.kv_length)
        if past is not None:
            key, value = paddle.concat([past[0], key], axis=1), paddle.concat([past[1], value], axis=1)
        found = self._run(query, key, value, context.mask, self.sinks if spec.sinks else None)
        flat = [0, 0, -1] if len(shape) == 3 else [-1, shape[-1]]
        return found.reshape(flat), (key, value) if context.use_cache else None

    def _norm_heads(self, states: Tensor, norm: RMSNorm) -> Tensor:
        if self.config.tensor_parallel_degree == 1:
            return norm(states)
        return rms_norm(states, sum_gradient_over_heads(norm.scale, self.config), norm.epsilon)

    def _run(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, sinks: Tensor | None) -> Tensor:
        spec = self.spec

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            dropout = spec.dropout if self.training else 0.0
            return attend(
                query, key, value, mask=mask, scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap,
                sinks=sinks, dropout=dropout,
            )  # fmt: skip

        if not should_recompute(self, "core_attn", query):
            return run(query, key, value)
        return recompute(run, query, key, value, use_reentrant=self.config.recompute_use_reentrant)


def should_recompute(layer: Any, part: str, x: Tensor) -> bool:
    """Whether a layer recomputes this part (--recompute_granularity) in the backward pass."""
    return layer.enable_recompute and layer.config.recompute_granularity == part and not x.stop_gradient


def _norm_of_all_heads(width: int, model: Architecture, config: Any) -> nn.Layer:
    if config.tensor_parallel_degree > 1:
        return SplitRMSNorm(width, model.norm_epsilon, config)
    return RMSNorm(width, model.norm_epsilon, config, model.norm_offset, follows_sequence=False)
