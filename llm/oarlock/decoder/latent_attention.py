"""Multi-head latent attention (MLA): keys and values are projected from a compressed state of each token.

DeepSeek-V2 (https://arxiv.org/abs/2405.04434), section 2.1, and appendix C for the equations. The KV cache holds the
projected keys and values, in the form that all kinds of attention share.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn
from paddle.distributed.fleet.utils.sequence_parallel_utils import AllGatherOp, mark_as_sequence_parallel_parameter

from oarlock.decoder.attention import KeysAndValues, LayerContext, attend_to_cache
from oarlock.decoder.linear import copy_to_ranks, make_linear
from oarlock.decoder.norm import RMSNorm
from oarlock.decoder.rotary import rotate
from oarlock.families.architecture import Architecture, LatentAttention
from oarlock.ops.lora_linear import project
from oarlock.typing import Tensor

_EPSILON = 1e-6  # of the norms of compressed states; rms_norm_eps is not for them (transformers' DeepseekV3Attention)


class LatentSelfAttention(nn.Layer):
    """Latent attention of one layer: this tensor-parallel rank's heads. The compressed states are on every rank."""

    def __init__(self, spec: LatentAttention, arch: Architecture, config: Any) -> None:
        super().__init__()
        self.spec, self.config, hidden = spec, config, arch.hidden
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
        kv_width = spec.heads * (spec.nope_dim + spec.value_dim)
        self.kv_b_proj = make_linear(spec.kv_rank, kv_width, config, split="column")
        self.o_proj = make_linear(spec.heads * spec.value_dim, hidden, config, split="row", bias=spec.bias)
        if config.sequence_parallel:  # each rank applies them to a part of the tokens
            for layer in (self.kv_a_proj_with_mqa, *([self.q_a_proj] if spec.query_rank is not None else [])):
                for parameter in layer.parameters():
                    mark_as_sequence_parallel_parameter(parameter)
        self.enable_recompute = False  # set by PretrainedModel.recompute_enable()

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
        spec = self.spec
        if spec.query_rank is None:
            query, compressed = project(x, self.q_proj, self.kv_a_proj_with_mqa)
        else:
            compressed_query, compressed = project(x, self.q_a_proj, self.kv_a_proj_with_mqa)
            (query,) = project(self.q_a_layernorm(compressed_query), self.q_b_proj)
        compressed_kv, k_rope = compressed.split([spec.kv_rank, spec.rope_dim], axis=-1)
        (kv,) = project(self.kv_a_layernorm(compressed_kv), self.kv_b_proj)
        rows = [-1, context.seq_length] if x.ndim == 2 else [0, 0]
        query = query.reshape([*rows, self.heads, spec.nope_dim + spec.rope_dim])
        kv = kv.reshape([*rows, self.heads, spec.nope_dim + spec.value_dim])
        # All heads share k_rope, also those of other ranks.
        k_rope = AllGatherOp.apply(k_rope) if self.config.sequence_parallel else copy_to_ranks(k_rope, self.config)
        k_rope = k_rope.reshape([*rows, 1, spec.rope_dim])
        q_nope, q_rope = query.split([spec.nope_dim, spec.rope_dim], axis=-1)
        k_nope, value = kv.split([spec.nope_dim, spec.value_dim], axis=-1)
        q_rope, k_rope = rotate(q_rope, k_rope, spec.rope, context.positions, context.kv_length)
        query = paddle.concat([q_nope, q_rope], axis=-1)
        key = paddle.concat([k_nope, k_rope + paddle.zeros_like(k_nope[..., :1])], axis=-1)
        output, present = attend_to_cache(self, query, key, value, context, past)
        width = self.heads * spec.value_dim
        return project(output.reshape([-1, width] if x.ndim == 2 else [0, 0, width]), self.o_proj)[0], present
