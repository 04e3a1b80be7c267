"""A decoder layer: norms, attention and MLP with their residuals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import paddle
from paddle import nn

from oarlock.decoder.attention import KeysAndValues, LayerContext, SelfAttention, run_part, should_recompute
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

    def __init__(self, spec: DecoderBlock, arch: Architecture, config: Any) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        attention, mlp = spec.attention, spec.mlp
        self.self_attn = (
            LatentSelfAttention(attention, arch, config)
            if isinstance(attention, LatentAttention)
            else SelfAttention(attention, arch, config)
        )
        self.add_sublayer(
            spec.mlp_name,
            MixtureOfExperts(mlp, arch.hidden, config) if isinstance(mlp, MoE) else GatedMLP(mlp, arch.hidden, config),
        )
        norms = spec.norms
        for name in (norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp):
            if name:
                self.add_sublayer(name, RMSNorm(arch.hidden, arch.norm_epsilon, config, arch.norm_offset))
        self.enable_recompute = False  # set by PretrainedModel.recompute_enable()

    @property
    def _mlp(self) -> nn.Layer:
        return self._sub_layers[self.spec.mlp_name]

    def forward(
        self, x: Tensor, context: LayerContext, past: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues | None]:
        """[batch, tokens, hidden] -> the same shape, and the KV cache if the context asks for it.

        Under sequence parallelism [batch x tokens / ranks, hidden].
        """
        if isinstance(self._mlp, MixtureOfExperts):
            context = replace(context, token_mask=self._mlp.take_mask())
        return run_part(self, "full", self._run, x, context, past)

    def _run(self, x: Tensor, context: LayerContext, past: KeysAndValues | None) -> tuple[Tensor, KeysAndValues | None]:
        if past is None and not context.use_cache and self._can_fuse_norms(x):
            return self._run_fused(x, context), None
        norms = self.spec.norms
        normed = self._norm(norms.before_attention, x)
        output, present = run_part(self, "full_attn", self.self_attn, normed, context, past)
        x = self._add(x, self._norm(norms.after_attention, output))
        output = self._run_mlp(self._norm(norms.before_mlp, x), context)
        return self._add(x, self._norm(norms.after_mlp, output)), present

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return self._sub_layers[name](x) if name else x

    def _add(self, x: Tensor, output: Tensor) -> Tensor:
        return x + (output if self.spec.residual_scale == 1.0 else output * self.spec.residual_scale)

    def _run_mlp(self, x: Tensor, context: LayerContext) -> Tensor:
        mlp = self._mlp
        return mlp(x, context.token_mask) if isinstance(mlp, MixtureOfExperts) else mlp(x)

    # The fused operators of training on a CPU

    def _can_fuse_norms(self, x: Tensor) -> bool:
        """Whether the fused norms can also add the residuals: both norms come before, and a backward pass follows."""
        norms = self.spec.norms
        before = [self._sub_layers.get(name) for name in (norms.before_attention, norms.before_mlp)]
        if norms.after_attention or norms.after_mlp or self.spec.residual_scale != 1.0 or None in before:
            return False
        if not paddle.is_grad_enabled() or should_recompute(self, "full_attn", x):
            return False
        return all(map(is_unmodified, before)) and can_fuse(x, *(norm.weight for norm in before))

    def _run_fused(self, x: Tensor, context: LayerContext) -> Tensor:
        first, second = self._sub_layers[self.spec.norms.before_attention], self._sub_layers[self.spec.norms.before_mlp]
        attention = self.self_attn
        if not self._can_fuse_layer(x):
            normed, residual = fused_rms_norm_kept(x, first.scale, first.epsilon)
            output, _ = attention(normed, context)
            normed, residual, _ = fused_add_rms_norm(output, residual, second.scale, second.epsilon)
            return residual + self._run_mlp(normed, context)
        linears = q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        *projected, residual, _ = fused_layer_start(x, first.scale, q.weight, k.weight, v.weight, first.epsilon)
        query, key, value = (
            states if linear.bias is None else states + linear.bias
            for states, linear in zip(projected, linears, strict=True)
        )
        output, _ = attention.compute_attention(query, key, value, context)
        gate, up, down = (linear.weight for linear in self._mlp._sub_layers.values())
        return fused_layer_end(output, residual, attention.o_proj.weight, second.scale, gate, up, down, second.epsilon)

    def _can_fuse_layer(self, x: Tensor) -> bool:
        """Whether custom_ops/decoder_layer supports it: SwiGLU, and plain linear layers that are all trained."""
        attention, mlp = self.spec.attention, self.spec.mlp
        if not isinstance(attention, Attention) or not isinstance(mlp, MLP) or mlp.activation not in ("silu", "swish"):
            return False
        if attention.packed or mlp.packed or attention.output_bias or mlp.bias:
            return False
        layers = [*self.self_attn._sub_layers.values(), *self._mlp._sub_layers.values()]
        linears = [layer for layer in layers if not isinstance(layer, RMSNorm)]
        if not all(type(layer) is nn.Linear and not layer.weight.stop_gradient for layer in linears):
            return False
        unmodified = all(map(is_unmodified, (self.self_attn, self._mlp, *linears)))
        return unmodified and can_fuse(x, *(layer.weight for layer in linears))
