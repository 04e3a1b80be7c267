"""A decoder layer: norms, attention and feed-forward with their residuals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import paddle
from paddle import nn
from paddle.distributed.fleet.utils import recompute

from oarlock.decoder.attention import KeysAndValues, ForwardContext, SelfAttention, should_recompute
from oarlock.decoder.latent_attention import LatentSelfAttention
from oarlock.decoder.mlp import GatedMLP
from oarlock.decoder.moe import MixtureOfExperts
from oarlock.decoder.norm import RMSNorm
from oarlock.families.architecture import MLP, Architecture, Attention, DecoderBlock, LatentAttention, MoE
from oarlock.ops.decoder_layer import fused_layer_end, fused_layer_start
from oarlock.ops.patch import can_fuse, is_unmodified
from oarlock.ops.rms_norm import fused_add_rms_norm, fused_rms_norm_kept
from oarlock.typing import Tensor


class DecoderLayer(nn.Layer):
    """One layer: x + scale * attention(norm(x)), then the same with the MLP."""

    def __init__(self, spec: DecoderBlock, model: Architecture, config: Any) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        self.self_attn = make_attention(spec, model, config)
        self.add_sublayer(spec.mlp_name, make_mlp(spec, model, config))
        for name in (
            spec.norms.before_attention,
            spec.norms.after_attention,
            spec.norms.before_mlp,
            spec.norms.after_mlp,
        ):
            if name:
                self.add_sublayer(name, RMSNorm(model.hidden, model.norm_epsilon, config, model.norm_offset))
        self.enable_recompute = False  # set by PretrainedModel.recompute_enable()

    def forward(
        self, x: Tensor, context: ForwardContext, past: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues | None]:
        """[batch, tokens, hidden] -> the same shape, and keys and values if `given` asks for them.

        Under sequence parallelism [batch x tokens / ranks, hidden].
        """
        mlp = self._sub_layers[self.spec.mlp_name]
        if isinstance(mlp, MixtureOfExperts):
            context = replace(context, token_mask=mlp.take_mask())
        if should_recompute(self, "full", x):
            return recompute(self._run, x, context, past, use_reentrant=self.config.recompute_use_reentrant)
        return self._run(x, context, past)

    def _run(
        self, x: Tensor, context: ForwardContext, past: KeysAndValues | None
    ) -> tuple[Tensor, KeysAndValues | None]:
        if past is None and not context.use_cache and self._adds_in_norms(x):
            return self._run_fused(x, context), None
        norms = self.spec.norms
        attended, present = self._attend(self._norm(norms.before_attention, x), context, past)
        x = self._add(x, self._norm(norms.after_attention, attended))
        added = self._feed_forward(self._norm(norms.before_mlp, x), context)
        return self._add(x, self._norm(norms.after_mlp, added)), present

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return self._sub_layers[name](x) if name else x

    def _add(self, x: Tensor, added: Tensor) -> Tensor:
        return x + (added if self.spec.residual_scale == 1.0 else added * self.spec.residual_scale)

    def _attend(
        self, x: Tensor, context: ForwardContext, past: KeysAndValues | None
    ) -> tuple[Tensor, KeysAndValues | None]:
        if should_recompute(self, "full_attn", x):
            return recompute(self.self_attn, x, context, past, use_reentrant=self.config.recompute_use_reentrant)
        return self.self_attn(x, context, past)

    def _feed_forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        mlp = self._sub_layers[self.spec.mlp_name]
        return mlp(x, context.token_mask) if isinstance(mlp, MixtureOfExperts) else mlp(x)

    # The fused operators of training on a CPU

    def _adds_in_norms(self, x: Tensor) -> bool:
        """Whether residuals can be added in the fused norms: both norms come before, and a backward pass follows."""
        norms = self.spec.norms
        before = [self._sub_layers.get(name) for name in (norms.before_attention, norms.before_mlp)]
        if norms.after_attention or norms.after_mlp or self.spec.residual_scale != 1.0 or None in before:
            return False
        if not paddle.is_grad_enabled() or should_recompute(self, "full_attn", x):
            return False
        return all(is_unmodified(norm) for norm in before) and can_fuse(x, *(norm.weight for norm in before))

    def _run_fused(self, x: Tensor, context: ForwardContext) -> Tensor:
        first, second = self._sub_layers[self.spec.norms.before_attention], self._sub_layers[self.spec.norms.before_mlp]
        if not self._trains_whole(x):
            normed, kept = fused_rms_norm_kept(x, first.scale, first.epsilon)
            attended, _ = self.self_attn(normed, context)
            normed, total, _ = fused_add_rms_norm(attended, kept, second.scale, second.epsilon)
            return total + self._feed_forward(normed, context)
        attention, mlp = self.self_attn, self._sub_layers[self.spec.mlp_name]
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        *states, kept, _ = fused_layer_start(x, first.scale, q.weight, k.weight, v.weight, first.epsilon)
        query, key, value = (
            state if one.bias is None else state + one.bias for state, one in zip(states, (q, k, v), strict=True)
        )
        attended, _ = attention.attend(query, key, value, context)
        gate, up, down = (linear.weight for linear in mlp._sub_layers.values())
        output = attention.o_proj.weight
        return fused_layer_end(attended, kept, output, second.scale, gate, up, down, second.epsilon)

    def _trains_whole(self, x: Tensor) -> bool:
        """Whether custom_ops/decoder_layer fits: SwiGLU, and plain linear layers that are all trained."""
        attention, mlp = self.spec.attention, self.spec.mlp
        if not isinstance(attention, Attention) or not isinstance(mlp, MLP) or mlp.activation not in ("silu", "swish"):
            return False
        if attention.packed or mlp.packed or attention.output_bias or mlp.bias:
            return False
        layers = [*self.self_attn._sub_layers.values(), *self._sub_layers[self.spec.mlp_name]._sub_layers.values()]
        linears = [layer for layer in layers if not isinstance(layer, RMSNorm)]
        is_plain = all(
            type(one) is nn.Linear and is_unmodified(one) and not one.weight.stop_gradient for one in linears
        )
        owners = (self.self_attn, self._sub_layers[self.spec.mlp_name])
        return is_plain and all(map(is_unmodified, owners)) and can_fuse(x, *(one.weight for one in linears))


def make_attention(spec: DecoderBlock, model: Architecture, config: Any) -> nn.Layer:
    """Make the attention of a layer."""
    if isinstance(spec.attention, LatentAttention):
        return LatentSelfAttention(spec.attention, model, config)
    return SelfAttention(spec.attention, model, config)


def make_mlp(spec: DecoderBlock, model: Architecture, config: Any) -> nn.Layer:
    """Make the feed-forward of a layer."""
    if isinstance(spec.mlp, MoE):
        return MixtureOfExperts(spec.mlp, model.hidden, config)
    return GatedMLP(spec.mlp, model.hidden, config)
