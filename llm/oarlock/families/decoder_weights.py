"""The weights of a decoder, by name and shape, and how many there are. Nothing here needs Paddle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from oarlock.families.architecture import MLP, Architecture, Attention, DecoderBlock, LatentAttention, MoE

HF_PREFIX = "model"  # first component of names in Hugging Face's files


@dataclass(frozen=True)
class DecoderWeight:
    """A weight of the model on one card.

    Attributes:
        name: without the model's prefix.
        shape: in memory; matrices are [in, out].
        is_matrix: of a linear layer, which Hugging Face stores as [out, in].
        share: of tokens that it is multiplied with (experts: top_k / experts).
    """

    name: str
    shape: tuple[int, ...]
    is_matrix: bool = False
    share: float = 1.0


def list_weights(model: Architecture) -> Iterator[DecoderWeight]:
    """Yield all weights but the output layer's, with names below the prefix ("layers.0.self_attn.q_proj.weight")."""
    yield DecoderWeight("embed_tokens.weight", (model.vocab, model.hidden), share=0.0)
    for i, block in enumerate(model.blocks):
        for weight in _list_block(block, model.hidden):
            yield DecoderWeight(f"layers.{i}.{weight.name}", weight.shape, weight.is_matrix, weight.share)
    yield DecoderWeight("norm.weight", (model.hidden,))


def list_full_names(model: Architecture, prefix: str = "") -> Iterator[tuple[str, DecoderWeight]]:
    """Yield (name in a file, weight) of all weights, the output layer's too if it is not tied.

    Args:
        prefix: first component of the names; that of the model in memory by default.
    """
    prefix = prefix or model.prefix
    for weight in list_weights(model):
        yield f"{prefix}.{weight.name}", weight
    if not model.tied:
        yield "lm_head.weight", DecoderWeight("lm_head.weight", (model.hidden, model.vocab), is_matrix=True)


def count_parameters(model: Architecture) -> int:
    """Count all parameters; a tied output layer has none of its own."""
    return sum(math.prod(weight.shape) for _, weight in list_full_names(model))


def count_used_parameters(model: Architecture) -> int:
    """Count the parameters in matrices that a token is multiplied with, the output layer included."""
    matrices = (weight for weight in list_weights(model) if weight.is_matrix)
    return round(sum(math.prod(one.shape) * one.share for one in matrices)) + model.hidden * model.vocab


def _list_block(block: DecoderBlock, hidden: int) -> Iterator[DecoderWeight]:
    attention = block.attention
    own = (
        _list_latent(attention, hidden)
        if isinstance(attention, LatentAttention)
        else _list_attention(attention, hidden)
    )
    for weight in own:
        yield DecoderWeight(f"self_attn.{weight.name}", weight.shape, weight.is_matrix)
    mlp = block.mlp
    for weight in _list_moe(mlp, hidden) if isinstance(mlp, MoE) else _list_mlp(mlp, hidden):
        yield DecoderWeight(f"{block.mlp_name}.{weight.name}", weight.shape, weight.is_matrix, weight.share)
    norms = block.norms
    for name in (norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp):
        if name:
            yield DecoderWeight(f"{name}.weight", (hidden,))


def _list_attention(spec: Attention, hidden: int) -> Iterator[DecoderWeight]:
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    if spec.packed:
        yield from _list_linear("qkv_proj", hidden, queries + 2 * keys, spec.qkv_bias)
    else:
        for name, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield from _list_linear(name, hidden, width, spec.qkv_bias)
    yield from _list_linear("o_proj", queries, hidden, spec.output_bias)
    if spec.qk_norm:
        widths = (queries, keys) if spec.qk_norm == "all_heads" else (spec.head_dim,) * 2
        for name, width in zip(("q_norm", "k_norm"), widths, strict=True):
            yield DecoderWeight(f"{name}.weight", (width,))
    if spec.sinks:
        yield DecoderWeight("sinks", (spec.heads,))


def _list_latent(spec: LatentAttention, hidden: int) -> Iterator[DecoderWeight]:
    queries = spec.heads * (spec.nope_dim + spec.rope_dim)
    if spec.query_rank is None:
        yield from _list_linear("q_proj", hidden, queries)
    else:
        yield from _list_linear("q_a_proj", hidden, spec.query_rank, spec.bias)
        yield DecoderWeight("q_a_layernorm.weight", (spec.query_rank,))
        yield from _list_linear("q_b_proj", spec.query_rank, queries)
    yield from _list_linear("kv_a_proj_with_mqa", hidden, spec.kv_rank + spec.rope_dim, spec.bias)
    yield DecoderWeight("kv_a_layernorm.weight", (spec.kv_rank,))
    yield from _list_linear("kv_b_proj", spec.kv_rank, spec.heads * (spec.nope_dim + spec.value_dim))
    yield from _list_linear("o_proj", spec.heads * spec.value_dim, hidden, spec.bias)


def _list_mlp(spec: MLP, hidden: int, path: str = "", share: float = 1.0) -> Iterator[DecoderWeight]:
    gate, up, down = spec.names
    if spec.packed:
        yield from _list_linear(f"{path}{gate}", hidden, 2 * spec.intermediate, spec.bias, share)
    else:
        for name in (gate, up):
            yield from _list_linear(f"{path}{name}", hidden, spec.intermediate, spec.bias, share)
    yield from _list_linear(f"{path}{down}", spec.intermediate, hidden, spec.bias, share)


def _list_moe(spec: MoE, hidden: int) -> Iterator[DecoderWeight]:
    router, shared = spec.names
    yield from _list_linear(router, hidden, spec.experts)
    if spec.bias_corrected:
        yield DecoderWeight(f"{router}.e_score_correction_bias", (spec.experts,))
    for i in range(spec.experts):
        yield from _list_mlp(spec.expert, hidden, f"experts.{i}.", spec.top_k / spec.experts)
    if spec.shared is not None:
        yield from _list_mlp(spec.shared, hidden, f"{shared}.")
        if spec.shared_gate:
            yield from _list_linear(f"{shared}_gate", hidden, 1)


def _list_linear(
    name: str, inputs: int, outputs: int, bias: bool = False, share: float = 1.0
) -> Iterator[DecoderWeight]:
    yield DecoderWeight(f"{name}.weight", (inputs, outputs), is_matrix=True, share=share)
    if bias:
        yield DecoderWeight(f"{name}.bias", (outputs,), share=share)
