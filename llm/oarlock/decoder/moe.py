"""A mixture of experts: each token is processed by a few gated MLPs out of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import paddle
from paddle import nn
from paddle.distributed import fleet
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.utils.sequence_parallel_utils import (
    GatherOp,
    ScatterOp,
    mark_as_sequence_parallel_parameter,
)
from paddle.nn import functional

from oarlock.decoder.all_to_all import TokenExchange
from oarlock.decoder.linear import find_runs
from oarlock.decoder.load_balance import LoadBalance
from oarlock.decoder.mlp import GatedMLP
from oarlock.decoder.router import Router, Routing, choose_experts
from oarlock.errors import ModelError
from oarlock.families.architecture import MLP, MoE
from oarlock.parallel.expert_groups import find_expert_groups
from oarlock.typing import Tensor
from oarlock.weights.tensor_slice import TensorSlice

_UNSPLIT = SimpleNamespace(tensor_parallel_degree=1, tensor_parallel_rank=0, sequence_parallel=False)


class MixtureOfExperts(nn.Layer):
    """Router, this rank's experts, and the shared expert. No token is dropped, however uneven the load is.

    Under expert parallelism, a rank holds some of the experts, which keep their numbers among all. Under tensor
    parallelism, it holds a part of every expert's intermediate features, and all ranks route the same tokens.
    """

    def __init__(self, spec: MoE, hidden: int, config: Any) -> None:
        super().__init__()
        self.spec, self._hidden, self._config = spec, hidden, config
        degree, rank = (
            getattr(config, f"expert_parallel_{name}", value) for name, value in (("degree", 1), ("rank", 0))
        )
        self._is_divided = degree > 1
        router, shared = spec.names
        self.add_sublayer(router, Router(spec, hidden))
        share = spec.experts // degree
        mine = range(rank * share, (rank + 1) * share)
        self.experts = nn.LayerDict({str(i): self._make_expert() for i in mine})
        if spec.shared is not None:
            self.add_sublayer(shared, GatedMLP(spec.shared, hidden, config))
            if spec.shared_gate:
                gate = nn.Linear(hidden, 1, bias_attr=False)
                if config.sequence_parallel:
                    mark_as_sequence_parallel_parameter(gate.weight)
                self.add_sublayer(f"{shared}_gate", gate)
        self.balance = LoadBalance(spec.experts)

    def _make_expert(self) -> GatedMLP:
        """Make an expert. forward() sums over tensor-parallel ranks, once for all experts, so this MLP does not."""
        degree, rank, spec = self._config.tensor_parallel_degree, self._config.tensor_parallel_rank, self.spec.expert
        expert = GatedMLP(replace(spec, intermediate=spec.intermediate // degree), self._hidden, _UNSPLIT)
        if self._is_divided:
            for parameter in expert.parameters():  # so that Fleet neither broadcasts them nor reduces their gradients
                parameter.no_sync = True
        if degree > 1:
            _mark_slices(expert, spec, self._hidden, degree, rank)
        return expert

    def forward(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        """[..., hidden] -> the same shape; under sequence parallelism [batch x tokens / ranks, hidden].

        Args:
            counted: bool [batch, tokens], False for padding, which does not count as load of the experts.
        """
        split = self._config.tensor_parallel_degree > 1
        group = fleet.get_hybrid_communicate_group().get_model_parallel_group() if split else None
        whole = GatherOp.apply(x) if self._config.sequence_parallel else x
        tokens = whole.reshape([-1, self._hidden])
        routing = self._route(tokens, counted)
        if split:  # the ranks' gradients of tokens and weights are summed
            tokens = mp_ops._c_identity(tokens, group=group)
            routing = routing._replace(weights=mp_ops._c_identity(routing.weights, group=group))
        mixed = self._combine_experts(tokens, routing)
        if split:
            mixed = mp_ops._mp_allreduce(mixed, group=group, use_calc_stream=True, use_model_parallel=True)
        mixed = mixed.reshape(whole.shape)
        if self._config.sequence_parallel:
            mixed = ScatterOp.apply(mixed)
        if self.spec.shared is None:
            return mixed
        name = self.spec.names[1]
        shared, gate = self._sub_layers[name](x), self._sub_layers.get(f"{name}_gate")
        return mixed + (shared if gate is None else functional.sigmoid(gate(x)) * shared)

    def take_mask(self) -> Tensor | None:
        """Take the padding mask of the next micro-batch in training. Recomputation uses the same one again."""
        return self.balance.take_mask() if self.training and paddle.is_grad_enabled() else None

    def _route(self, tokens: Tensor, counted: Tensor | None) -> Routing:
        scored = self._sub_layers[self.spec.names[0]](tokens)
        logits, correction = scored if isinstance(scored, tuple) else (scored, None)
        if self.spec.bias_corrected and correction is None:  # LoRA has replaced the router
            raise ModelError(
                f"LoRA on the router ({self.spec.names[0]}) of this family is not supported: its choice has a "
                "correction, which would be lost; leave it out of --lora_target_modules"
            )
        routing = choose_experts(logits.astype("float32"), self.spec, correction)
        if self.training and paddle.in_dynamic_mode() and paddle.is_grad_enabled():
            return routing._replace(weights=self.balance.add(routing, counted))
        return routing

    def _combine_experts(self, tokens: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of the chosen experts' outputs, [tokens, hidden]."""
        choices = routing.experts.flatten()  # token after token
        order = paddle.argsort(choices, stable=True)
        rows = paddle.gather(tokens, order // self.spec.top_k)
        if not paddle.in_dynamic_mode():
            found = self._apply_traced(rows, choices)
        else:
            counts = paddle.bincount(choices, minlength=self.spec.experts)
            if not self._is_divided:
                found = self._apply(rows, counts.tolist())
            else:
                groups = find_expert_groups()
                assert groups is not None
                exchange = TokenExchange(counts, groups.exchange)
                found = exchange.send_back(self._apply(exchange.send(rows), exchange.counts))
        found = paddle.gather(found, paddle.argsort(order)).reshape([-1, self.spec.top_k, self._hidden])
        weights = routing.weights.astype(found.dtype).unsqueeze(1)
        return paddle.matmul(weights, found).squeeze(1).astype(tokens.dtype)

    def _apply(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Apply this rank's experts to rows [tokens, hidden] that are sorted by expert."""
        sizes = [count for count in counts if count]
        parts = iter(paddle.split(rows, sizes, axis=0) if len(sizes) > 1 else [rows])
        # Without any rows, the backward pass has to run as well: other ranks wait for this one in its all-to-all.
        found = [] if sizes else [rows]
        for expert, count in zip(self.experts.values(), counts, strict=True):
            if count:
                found.append(expert(next(parts)))
            elif paddle.is_grad_enabled():
                # The weights of an expert without tokens get gradients of 0, which optimizers and other ranks expect.
                # One row is needed, because the backward pass of Paddle's matrix product fails without any.
                found.append(expert(paddle.zeros([1, self._hidden], rows.dtype))[:0])
        return paddle.concat(found, axis=0)

    def _apply_traced(self, rows: Tensor, choices: Tensor) -> Tensor:
        """_apply() in a static graph, which is built without knowing the number of tokens of each expert."""
        ends = paddle.cumsum(functional.one_hot(choices, self.spec.experts).sum(0).astype("int64"))
        starts = paddle.concat([paddle.zeros([1], "int64"), ends[:-1]])
        parts = [
            expert(paddle.slice(rows, axes=[0], starts=[starts[i]], ends=[ends[i]]))
            for i, expert in enumerate(self.experts.values())
        ]
        return paddle.concat(parts, axis=0)


def _mark_slices(expert: GatedMLP, spec: MLP, hidden: int, degree: int, rank: int) -> None:
    """Record which slices of an expert this tensor-parallel rank holds."""
    if spec.bias:
        raise ModelError("experts with biases can't be split among tensor-parallel ranks")
    *before, down = expert.sublayers()
    parts = (spec.intermediate,) * (2 if spec.packed else 1)
    for layer in before:
        layer.weight.tensor_slice = TensorSlice((hidden, sum(parts)), 1, find_runs(parts, degree, rank))
    down.weight.tensor_slice = TensorSlice((spec.intermediate, hidden), 0, find_runs(parts[:1], degree, rank))
    for parameter in expert.parameters():
        parameter.is_distributed = True
