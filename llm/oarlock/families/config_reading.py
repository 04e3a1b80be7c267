"""Makes the parts of an architecture from a configuration, by the fields that most families have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from oarlock.errors import ModelError
from oarlock.families.architecture import (
    MLP,
    Architecture,
    Attention,
    DecoderBlock,
    LatentAttention,
    MoE,
    Norms,
    Rope,
)
from oarlock.families.rope import read_rope

SANDWICH_NORMS = Norms(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_SLIDING, _FULL = "sliding_attention", "full_attention"
_ACTIVATIONS = {"swish": "silu", "gelu_python": "gelu", "gelu_new": "gelu_pytorch_tanh"}  # synonyms


def read_head_dim(config: Any) -> int:
    """Size of a head: head_dim, or the hidden size divided among the heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def read_partial_rope(config: Any, interleaved: bool = False) -> Rope:
    """The rotary embedding, of a part of each head where the configuration has a partial_rotary_factor."""
    dim = int(read_head_dim(config) * (getattr(config, "partial_rotary_factor", None) or 1.0))
    return replace(read_rope(config, dim), interleaved=interleaved)


def read_attention(config: Any, rope: Rope | None, **changes: Any) -> Attention:
    """Attention by the usual fields of transformers.

    Args:
        changes: fields of Attention that no such field determines, or that differ.

    Raises:
        ModelError: for a window or soft cap of 0.
    """
    head_dim, heads = read_head_dim(config), config.num_attention_heads
    bias = bool(getattr(config, "attention_bias", False))
    usual = Attention(
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        qkv_bias=bias,
        output_bias=bias,
        rope=rope,
        dropout=float(getattr(config, "attention_dropout", 0.0) or 0.0),
        packed="groups" if getattr(config, "fuse_attention_qkv", False) else "",
    )
    attention = replace(usual, **changes)
    if attention.window is not None and attention.window < 1:
        raise ModelError(f"sliding_window has to be above 0, or null; it is {attention.window}")
    if attention.soft_cap is not None and attention.soft_cap <= 0:
        raise ModelError(f"attn_logit_softcapping has to be above 0, or null; it is {attention.soft_cap}")
    if attention.window is not None and attention.window >= config.max_position_embeddings:
        return replace(attention, window=None)  # such as that of Phi-4: no text is longer
    return attention


def read_latent_attention(config: Any, interleaved: bool) -> LatentAttention:
    """Latent attention by transformers' fields. Scaling by yarn also scales the scores (mscale_all_dim)."""
    rope = replace(read_rope(config, config.qk_rope_head_dim), interleaved=interleaved)
    factor, all_dims = float(rope.scaling.get("factor", 1.0)), float(rope.scaling.get("mscale_all_dim", 0.0))
    mscale = 0.1 * all_dims * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    return LatentAttention(
        heads=config.num_attention_heads,
        query_rank=config.q_lora_rank,
        kv_rank=config.kv_lora_rank,
        nope_dim=config.qk_nope_head_dim,
        rope_dim=config.qk_rope_head_dim,
        value_dim=config.v_head_dim,
        scale=(config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5 * mscale**2,
        rope=rope,
        bias=config.attention_bias,
        dropout=float(config.attention_dropout),
    )


def read_mlp(config: Any, intermediate: int | None = None, **changes: Any) -> MLP:
    """A gated MLP by the usual fields of transformers, and PaddleNLP's fuse_attention_ffn.

    Args:
        intermediate: its width, where that is not intermediate_size.
        changes: as in read_attention().
    """
    activation = str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or "silu")
    usual = MLP(
        intermediate=intermediate or config.intermediate_size,
        activation=_ACTIVATIONS.get(activation, activation),
        bias=bool(getattr(config, "mlp_bias", False)),
    )
    if getattr(config, "fuse_attention_ffn", False):
        usual = replace(usual, packed=True, names=("gate_up_fused_proj", "", "down_proj"))
    return replace(usual, **changes)


def read_windows(config: Any, slides: Callable[[int], bool]) -> list[int | None]:
    """The sliding window of each layer, None for layers without one.

    Args:
        slides: whether layer i has one, if the configuration has no layer_types.

    Raises:
        ModelError: for layer_types of another number of layers, or of a kind that is not known.
    """
    kinds, layers = getattr(config, "layer_types", None), range(config.num_hidden_layers)
    if kinds is not None and (len(kinds) != len(layers) or set(kinds) - {_SLIDING, _FULL}):
        raise ModelError(
            f"layer_types has to name one of {_SLIDING} and {_FULL} for each of the {len(layers)} layers; it is {kinds}"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return [window if (slides(i) if kinds is None else kinds[i] == _SLIDING) else None for i in layers]


def read_moe(config: Any, experts: int, expert: MLP, **changes: Any) -> MoE:
    """A mixture of experts by the usual fields of transformers.

    Args:
        expert: one of them.
        changes: as in read_attention().
    """
    counts = bool(getattr(config, "output_router_logits", False))  # transformers adds the loss only then
    usual = MoE(
        experts=experts,
        top_k=config.num_experts_per_tok,
        expert=expert,
        aux_loss=float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0) if counts else 0.0,
    )
    return replace(usual, **changes)


def make_blocks(
    attentions: Iterable[Attention | LatentAttention], mlps: MLP | MoE | Sequence[MLP | MoE], **changes: Any
) -> tuple[DecoderBlock, ...]:
    """One layer for each attention; `mlps` is that of all layers, or one for each."""
    attentions = list(attentions)
    each = [mlps] * len(attentions) if isinstance(mlps, (MLP, MoE)) else mlps
    return tuple(DecoderBlock(attention, mlp, **changes) for attention, mlp in zip(attentions, each, strict=True))


def read_architecture(
    config: Any, blocks: tuple[DecoderBlock, ...], prefix: str = "model", **changes: Any
) -> Architecture:
    """A model of these layers by the usual fields of transformers.

    Args:
        changes: as in read_attention().

    Raises:
        ModelError: for a soft cap of 0.
    """
    usual = Architecture(
        prefix=prefix,
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        blocks=blocks,
        norm_epsilon=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        tied=bool(config.tie_word_embeddings),
        initializer_range=config.initializer_range,
    )
    found = replace(usual, **changes)
    if found.logit_soft_cap is not None and found.logit_soft_cap <= 0:
        raise ModelError(f"final_logit_softcapping has to be above 0, or null; it is {found.logit_soft_cap}")
    return found
