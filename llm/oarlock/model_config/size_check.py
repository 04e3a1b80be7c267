"""Checks that the sizes of a configuration fit together, and computes their memory, before a model is constructed."""

from __future__ import annotations

from typing import Any

from oarlock.errors import ModelError
from oarlock.families.architecture import MoE
from oarlock.families.decoder_weights import count_parameters
from oarlock.families.family import Family
from oarlock.families.model_sizes import ModelSizes
from oarlock.families.registry import FAMILIES, find_family
from oarlock.model_config.hf_fields import ACTIVATIONS

_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")
_ACTIVATIONS = {*ACTIVATIONS, "gelu_python", "tanh", "sigmoid"}  # PaddleNLP looks other names up as attributes
_FLOAT = 4
_MOST_EXPERTS = 1 << 18  # of all layers; a model of a trillion parameters has 23,000


def check_sizes(config: Any, place: str) -> None:
    """Refuse sizes from which the model can't make heads or experts.

    Args:
        config: a configuration, its fields in their ranges.
        place: the file, for messages.

    Raises:
        ModelError: naming the fields.
    """
    sizes, family = ModelSizes.from_config(config), find_family(config.model_type)
    own_head_dim = getattr(config, "head_dim", None) or getattr(config, "qk_nope_head_dim", None)
    has_own_head_dim = family.free_head_dim and own_head_dim
    if not has_own_head_dim and sizes.hidden % sizes.heads:
        raise ModelError(f"{place}: a hidden size of {sizes.hidden} can't be divided into {sizes.heads} heads")
    known, whose = (_ACTIVATIONS, "PaddleNLP") if family.decoder is None else ({*ACTIVATIONS, "gelu_python"}, "Oarlock")
    for name in _ACTIVATION_FIELDS:
        if (value := getattr(config, name, None)) is not None and value not in known:
            raise ModelError(f"{place}: {name} is {value!r}; {whose} computes with {', '.join(sorted(known))}")
    if sizes.heads % sizes.kv_heads:
        raise ModelError(f"{place}: {sizes.heads} heads can't share the keys of {sizes.kv_heads} (num_key_value_heads)")
    channels = getattr(config, "kv_channels", None)
    head = channels or sizes.head_size
    if channels and channels * sizes.heads != sizes.hidden:
        raise ModelError(f"{place}: {sizes.heads} heads of {head} (kv_channels) are not the hidden size {sizes.hidden}")
    if head % family.head_size_multiple:
        raise ModelError(
            f"{place}: heads of size {head}: the rotary embeddings of {family.name} need a multiple of "
            f"{family.head_size_multiple}"
        )
    rotary = getattr(config, "rotary_dim", None)
    if rotary is not None and (rotary % 2 or rotary > head):
        raise ModelError(f"{place}: rotary_dim is {rotary}; it has to be even, and at most the {head} of a head")
    if family.decoder is not None:
        _check_decoder(config, family, sizes, place)


def _check_decoder(config: Any, family: Family, sizes: ModelSizes, place: str) -> None:
    if sizes.num_layers * sizes.experts > _MOST_EXPERTS:
        raise ModelError(
            f"{place}: {sizes.num_layers:,} layers of {sizes.experts:,} experts are more than any published model has"
        )
    chosen = getattr(config, "num_experts_per_tok", None)
    if sizes.experts and not 0 < (chosen or 0) <= sizes.experts:
        raise ModelError(f"{place}: num_experts_per_tok is {chosen}, of {sizes.experts} experts")
    groups, used = getattr(config, "n_group", None) or 1, getattr(config, "topk_group", None) or 1
    if sizes.experts % groups or not used <= groups or used * sizes.experts // groups < (chosen or 0):
        raise ModelError(
            f"{place}: {sizes.experts} experts in n_group {groups} groups, of which topk_group {used} are used, can't "
            f"give num_experts_per_tok {chosen}"
        )
    try:
        assert family.decoder is not None
        mlps = [block.mlp for block in family.decoder(config).blocks]
    except ModelError as error:
        raise ModelError(f"{place}: {error}") from error
    by_two = any(isinstance(mlp, MoE) and mlp.groups > 1 and mlp.group_score == "top2_sum" for mlp in mlps)
    if by_two and sizes.experts // groups < 2:
        raise ModelError(
            f"{place}: {sizes.experts} experts in n_group {groups} groups: {family.name} chooses groups by their two "
            "best experts, so they need two"
        )


def count_table_bytes(config: Any) -> int:
    """Count the bytes of what a model computes for all its positions and keeps.

    Our decoder has one table of rotary embeddings for all layers, which only grows to the longest text where the fused
    decoder does not serve it. Layers of PaddleNLP's GPT-J have masks, which are allocated before any weight.
    """
    sizes = ModelSizes.from_config(config)
    positions = int(getattr(config, "max_position_embeddings", None) or 0)
    family = FAMILIES.get(config.model_type)
    if family is not None and family.decoder is not None:
        ropes = (block.attention.rope for block in family.decoder(config).blocks)
        return 2 * positions * max((rope.dim for rope in ropes if rope is not None), default=0) * _FLOAT
    return sizes.num_layers * positions**2 * _FLOAT if family is not None and family.layer_masks else 0


def count_least_parameters(config: Any) -> int:
    """Count the parameters that a model has at least.

    That is all of them in our decoder; elsewhere, the feed-forward of the layers and the embedding.
    """
    sizes, family = ModelSizes.from_config(config), FAMILIES.get(config.model_type)
    if family is not None and family.decoder is not None:
        return count_parameters(family.decoder(config))
    return sizes.hidden * (sizes.vocab + 2 * sizes.num_layers * sizes.intermediate)
