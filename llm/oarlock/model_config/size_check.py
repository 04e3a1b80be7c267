"""Whether the sizes of a configuration go together, and what they take, before a model is made. Pure Python."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from oarlock.errors import ModelError
from oarlock.model_config.hf_fields import ACTIVATIONS
from oarlock.parallel.family_rules import ModelSizes

_TABLES = ("llama", "qwen2", "mistral", "gemma")  # a cosine and a sine for every position, in each layer
_OWN_HEADS = ("gemma", "chatglm_v2")  # the size of a head is a field of its own
_ROTARY = (*_TABLES, "chatglm", "chatglm_v2")
_PADDED = ("mistral", "opt", "bloom", "glm")  # whose embedding is told which row is padding
_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")
_ACTIVATIONS = {*ACTIVATIONS, "gelu_python", "tanh", "sigmoid"}  # PaddleNLP takes any other name for an attribute
_FLOAT = 4
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight")


def check_sizes(config: Any, place: str) -> None:
    """Refuse sizes that PaddleNLP's model can't be cut into heads by.

    Args:
        config: PaddleNLP's configuration, its fields in their ranges.
        place: the file, for messages.

    Raises:
        ModelError: naming the fields.
    """
    sizes = ModelSizes.of(config)
    own = sizes.family in _OWN_HEADS
    if not own and sizes.hidden % sizes.heads:
        raise ModelError(f"{place}: a hidden size of {sizes.hidden} can't be divided into {sizes.heads} heads")
    for name in _ACTIVATION_FIELDS:
        if (value := getattr(config, name, None)) is not None and value not in _ACTIVATIONS:
            raise ModelError(f"{place}: {name} is {value!r}; PaddleNLP computes with {', '.join(sorted(_ACTIVATIONS))}")
    if sizes.heads % sizes.kv_heads:
        raise ModelError(f"{place}: {sizes.heads} heads can't share the keys of {sizes.kv_heads} (num_key_value_heads)")
    head = getattr(config, "kv_channels", None) or sizes.head_size
    if sizes.family == "chatglm_v2" and head * sizes.heads != sizes.hidden:
        raise ModelError(f"{place}: {sizes.heads} heads of {head} (kv_channels) are not the hidden size {sizes.hidden}")
    if sizes.family in _ROTARY and head % 2:
        raise ModelError(f"{place}: heads of size {head}: rotary embeddings need an even one")
    if sizes.family == "chatglm" and head % 4:  # half of it for each of the two kinds of positions
        raise ModelError(f"{place}: heads of size {head}: the rotary embeddings of chatglm need a multiple of 4")
    rotary = getattr(config, "rotary_dim", None)
    if rotary is not None and (rotary % 2 or rotary > head):
        raise ModelError(f"{place}: rotary_dim is {rotary}; it has to be even, and at most the {head} of a head")
    pad = getattr(config, "pad_token_id", None)
    if sizes.family in _PADDED and pad is not None and pad >= sizes.vocab:
        raise ModelError(f"{place}: pad_token_id is {pad}, and the vocabulary has {sizes.vocab} rows (vocab_size)")


def table_bytes(config: Any) -> int:
    """What PaddleNLP's model computes itself and keeps when it is made: tables of rotary embeddings, masks.

    They are there before any weight is: their size follows from the positions alone.
    """
    sizes = ModelSizes.of(config)
    positions = int(getattr(config, "max_position_embeddings", None) or 0)
    if sizes.family in _TABLES:
        return 2 * sizes.num_layers * positions * sizes.head_size * _FLOAT
    if sizes.family == "gptj":  # what a token sees of those before it
        return sizes.num_layers * positions**2 * _FLOAT
    return 0


def least_parameters(config: Any) -> int:
    """At least so many parameters a model of this configuration has: the feed-forward of its layers, the embedding."""
    sizes = ModelSizes.of(config)
    return sizes.hidden * (sizes.vocab + 2 * sizes.num_layers * sizes.intermediate)


def check_stored(config: Any, shapes: Mapping[str, tuple[int, ...]], place: str) -> None:
    """Refuse a configuration of more layers, or another width or vocabulary, than the tensors in its files have.

    After this a model of the configuration is no larger than its files, so that it can be made (without memory for its
    weights) and compared with them name by name.

    Args:
        config: PaddleNLP's configuration.
        shapes: of the stored tensors, under any program's names.
        place: of config.json, for messages.

    Raises:
        ModelError: naming the sizes on both sides.
    """
    sizes = ModelSizes.of(config)
    numbers = [int(found[1]) for name in shapes if (found := _LAYER.search(name))]
    layers = max(numbers, default=-1) + 1
    if sizes.num_layers > layers:
        raise ModelError(f"{place} says {sizes.num_layers:,} layers, and the weights beside it have {layers:,}")
    embedding = next((name for name in shapes if name.endswith(EMBEDDINGS)), None)
    if embedding is not None and len(shapes[embedding]) == 2 and shapes[embedding] != (sizes.vocab, sizes.hidden):
        rows, width = shapes[embedding]
        raise ModelError(
            f"{place} says a vocabulary of {sizes.vocab:,} and a hidden size of {sizes.hidden:,}, and {embedding} in "
            f"the weights beside it has {rows:,} rows of {width:,}"
        )
    widest = max((size for shape in shapes.values() for size in shape), default=0)
    for what, size in (("intermediate size", sizes.intermediate), ("size of all heads", sizes.heads * sizes.head_size)):
        if size > 3 * widest:  # three matrices may be stored as one, and none is wider than all of them together
            raise ModelError(f"{place} says a {what} of {size:,}, and no tensor in the weights beside it is so large")
