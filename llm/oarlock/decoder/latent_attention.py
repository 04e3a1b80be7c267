"""Multi-head latent attention: keys and values are projected from a compressed state of each token.

DeepSeek-V2 (https://arxiv.org/abs/2405.04434), section 2.1, and appendix C for the equations. The cache holds expanded
keys and values, so that all kinds of attention share one form of it.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn
from paddle.distributed import collective, fleet
from paddle.distributed.fleet.utils import recompute
from paddle.distributed.fleet.utils.sequence_parallel_utils import AllGatherOp, mark_as_sequence_parallel_parameter

from oarlock.decoder.attention import KeysAndValues, ForwardContext, should_recompute
from oarlock.decoder.linear import make_linear
from oarlock.decoder.norm import RMSNorm
from oarlock.decoder.rotary import rotate
from oarlock.families.architecture import Architecture, LatentAttention
from oarlock.ops.attention import attend
from oarlock.ops.lora_linear import project
from oarlock.typing import Tensor

_EPSILON = 1e-6  # of the norms of compressed states, whatever rms_norm_eps says (transformers' DeepseekV3Attention)


class LatentSelfAttention(nn.Layer):
    """Latent attention of one layer: this tensor-parallel rank's heads. The compressed states are on every rank."""

    def __init__(self, spec: LatentAttention, model: Architecture, config: Any) -> None:
        super().__init__()
        self.spec, self.config, hidden = spec, config, model.hidden
        self.heads = spec.heads // config.tensor_parallel_degree
        queries = spec.heads * (spec.nope_dim + spec.rope_dim)
        if spec.query_rank is None:
            self.q_proj = make_linear(hidden, queries, config, split="column")
        else:
            self.q_a_proj = make_linear(hidden, spec.query_rank, config, bias=spec.bias)
            self.q_a_layernorm = RMSNorm(spec.query_rank, _EPSILON, config)
            self.q_b_proj = make_linear(spec.query_rank, queries, config, split="column")
        self.kv_a_proj_with_mqa = make_linear(hidden, spec.kv_rank + spec.rope_dim, config, bias=spec.bias)
        self.kv_a_layernorm = RMSNorm(spec.kv_rank, _EPSILON, config)
        expanded = spec.heads * (spec.nope_dim + spec.value_dim)
        self.kv_b_proj = make_linear(spec.kv_rank, expanded, config, split="column")
        self.o_proj = make_linear(spec.heads * spec.value_dim, hidden, config, split="row", bias=spec.bias)
        if config.sequence_parallel:  # they see a part of the tokens on each rank
            for layer in (self.kv_a_proj_with_mqa, *([self.q_a_proj] if spec.query_rank is not None else [])):
                for parameter in layer.parameters():
                    mark_as_sequence_parallel_parameter(parameter)
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
        spec = self.spec
        if spec.query_rank is None:
            query, compressed = project(x, self.q_proj, self.kv_a_proj_with_mqa)
        else:
            of_query, compressed = project(x, self.q_a_proj, self.kv_a_proj_with_mqa)
            (query,) = project(self.q_a_layernorm(of_query), self.q_b_proj)
        state, turned = compressed.split([spec.kv_rank, spec.rope_dim], axis=-1)
        (expanded,) = project(self.kv_a_layernorm(state), self.kv_b_proj)
        rows = [-1, context.seq_length] if x.ndim == 2 else [0, 0]
        query = query.reshape([*rows, self.heads, spec.nope_dim + spec.rope_dim])
        expanded = expanded.reshape([*rows, self.heads, spec.nope_dim + spec.value_dim])
        turned = self._share(turned).reshape([*rows, 1, spec.rope_dim])
        plain_query, turned_query = query.split([spec.nope_dim, spec.rope_dim], axis=-1)
        plain_key, value = expanded.split([spec.nope_dim, spec.value_dim], axis=-1)
        turned_query, turned = rotate(turned_query, turned, spec.rope, context.positions, context.kv_length)
        query = paddle.concat([plain_query, turned_query], axis=-1)
        # One rotated part serves all heads.
        key = paddle.concat([plain_key, turned + paddle.zeros_like(plain_key[..., :1])], axis=-1)
        if past is not None:
            key, value = paddle.concat([past[0], key], axis=1), paddle.concat([past[1], value], axis=1)

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            dropout = spec.dropout if self.training else 0.0
            return attend(query, key, value, mask=context.mask, scale=spec.scale, dropout=dropout)

        if should_recompute(self, "core_attn", query):
            found = recompute(run, query, key, value, use_reentrant=self.config.recompute_use_reentrant)
        else:
            found = run(query, key, value)
        width = self.heads * spec.value_dim
        (output,) = project(found.reshape([-1, width] if x.ndim == 2 else [0, 0, width]), self.o_proj)
        return output, (key, value) if context.use_cache else None

    def _share(self, turned: Tensor) -> Tensor:
        """The part of the keys that all heads share: its gradient is summed over the tensor-parallel ranks."""
        if self.config.tensor_parallel_degree == 1:
            return turned
        if self.config.sequence_parallel:
            return AllGatherOp.apply(turned)
        return collective._c_identity(turned, group=fleet.get_hybrid_communicate_group().get_model_parallel_group())
