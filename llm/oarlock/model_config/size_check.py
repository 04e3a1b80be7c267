"""Checks that the sizes of a configuration fit together, and computes their memory, before a model is constructed."""

from __future__ import annotations

from typing import Any

from oarlock.errors import ModelError
from oarlock.families.model_sizes import ModelSizes
from oarlock.families.registry import FAMILIES, find_family
from oarlock.model_config.hf_fields import ACTIVATIONS

_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")
_ACTIVATIONS = {*ACTIVATIONS, "gelu_python", "tanh", "sigmoid"}  # PaddleNLP looks other names up as attributes
_FLOAT = 4


def check_sizes(config: Any, place: str) -> None:
    """Refuse sizes from which PaddleNLP's model can't make heads.

    Args:
        config: PaddleNLP's configuration, its fields in their ranges.
        place: the file, for messages.

    Raises:
        ModelError: naming the fields.
    """
    sizes, family = ModelSizes.from_config(config), find_family(config.model_type)
    has_own_head_dim = family.free_head_dim and getattr(config, "head_dim", None)
    if not has_own_head_dim and sizes.hidden % sizes.heads:
        raise ModelError(f"{place}: a hidden size of {sizes.hidden} can't be divided into {sizes.heads} heads")
    for name in _ACTIVATION_FIELDS:
        if (value := getattr(config, name, None)) is not None and value not in _ACTIVATIONS:
            raise ModelError(f"{place}: {name} is {value!r}; PaddleNLP computes with {', '.join(sorted(_ACTIVATIONS))}")
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
    pad = getattr(config, "pad_token_id", None)
    if family.padded_embedding and pad is not None and pad >= sizes.vocab:
        raise ModelError(f"{place}: pad_token_id is {pad}, and the vocabulary has {sizes.vocab} rows (vocab_size)")


def count_table_bytes(config: Any) -> int:
    """Count the bytes of what PaddleNLP's model precomputes and keeps: tables of rotary embeddings, masks.

    They are allocated before any weight, and their size depends on the positions alone.
    """
    sizes = ModelSizes.from_config(config)
    positions = int(getattr(config, "max_position_embeddings", None) or 0)
    family = FAMILIES.get(config.model_type)
    tables = family.layer_tables if family is not None else ""
    if tables == "rotary":  # a cosine and a sine for every position, in each layer
        return 2 * sizes.num_layers * positions * sizes.head_size * _FLOAT
    if tables == "mask":
        return sizes.num_layers * positions**2 * _FLOAT
    return 0


def count_least_parameters(config: Any) -> int:
    """Count the parameters that a model has at least: the feed-forward of its layers and the embedding."""
    sizes = ModelSizes.from_config(config)
    return sizes.hidden * (sizes.vocab + 2 * sizes.num_layers * sizes.intermediate)
