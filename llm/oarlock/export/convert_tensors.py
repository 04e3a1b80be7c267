"""Every tensor of the converted model: its name there, and where its values come from.

In between stand the names and matrices of PaddleNLP's plain model on one card ([in, out], nothing fused), which both
layouts are read as.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from paddle.base.framework import EagerParamBase
from paddlenlp.transformers import PretrainedConfig

from oarlock.errors import ModelError
from oarlock.model_config.load import find_model_class
from oarlock.models.layer_offload import empty_model
from oarlock.models.open_weights import named
from oarlock.models.proof import TOLERANCES
from oarlock.weights.hf_names import hugging_face_names
from oarlock.weights.layout import ParameterShard, parameter_shards
from oarlock.weights.safetensors_file import TensorSource
from oarlock.weights.sources import FileSource, stored_dtype


@dataclass(frozen=True)
class Plain:
    """A parameter of the plain model.

    Attributes:
        name, shape: in PaddleNLP's plain model.
        stored: what it is read from in the source, by the name the source gives it.
        part: cuts it out of that, where it is fused with others.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    part: Callable[[np.ndarray], np.ndarray] | None = None


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """The same model with nothing fused."""
    plain = copy.deepcopy(config)
    for name in ("fuse_attention_qkv", "fuse_attention_ffn"):
        if getattr(plain, name, False):
            setattr(plain, name, False)
    return plain


def plain_parameters(source: FileSource, config: PretrainedConfig) -> list[Plain]:
    """All parameters, each once, in the order in which the source is read fastest.

    Raises:
        ModelError: naming those that are missing or of another shape. (open_weights refuses those left over.)
    """
    held, plain = _held(config), plain_config(config)
    stored = _parameters(held)
    parts = {part.name: part for name, shape in stored.items() for part in parts_of(name, shape, config)}
    fused = any(part.part is not None for part in parts.values())
    wanted = shapes_of(plain) if fused else stored
    lacking = [name for name in wanted if parts.get(name) is None or parts[name].stored not in source.shapes]
    if lacking:
        raise ModelError(f"{source.place}: {named(lacking, len(wanted))} missing; nothing was written")
    for name, shape in stored.items():
        found = source.shapes.get(name)
        if found is not None and found != shape:
            raise ModelError(f"{source.place}: {name} is {list(found)}, config.json makes it {list(shape)}")
    order = {name: i for i, name in enumerate(source.shapes)}
    return sorted((parts[name] for name in wanted), key=lambda part: order[part.stored])


def shapes_of(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of PaddleNLP's model."""
    return _parameters(_held(config))


def _parameters(held: Sequence[ParameterShard]) -> dict[str, tuple[int, ...]]:
    return {parameter.name: parameter.slice.shape for parameter in held if isinstance(parameter.tensor, EagerParamBase)}


def _held(config: PretrainedConfig) -> list[ParameterShard]:
    return parameter_shards(empty_model(find_model_class(config), config))


# fused inputs


def parts_of(name: str, shape: tuple[int, ...], config: PretrainedConfig) -> Iterator[Plain]:
    """What a parameter of the source's model is in the plain one."""
    layer, _, kind = name.rpartition(".")
    path, _, last = layer.rpartition(".")
    width = shape[-1] if shape else 0
    if last == "gate_up_fused_proj":  # [gate | up]
        for i, own in enumerate(("gate_proj", "up_proj")):
            half = slice(i * width // 2, (i + 1) * width // 2)
            yield Plain(f"{path}.{own}.{kind}", (*shape[:-1], width // 2), name, partial(_columns, half))
    elif last == "qkv_proj":  # per head of keys and values: [its queries, key, value]
        groups = config.num_key_value_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries = config.num_attention_heads // groups * head
        for own, begin, size in (("q", 0, queries), ("k", queries, head), ("v", queries + head, head)):
            cut = partial(_of_groups, groups, slice(begin, begin + size))
            yield Plain(f"{path}.{own}_proj.{kind}", (*shape[:-1], groups * size), name, cut)
    else:
        yield Plain(name, shape, name)


def _columns(which: slice, values: np.ndarray) -> np.ndarray:
    return values[..., which]


def _of_groups(groups: int, which: slice, values: np.ndarray) -> np.ndarray:
    each = values.reshape(*values.shape[:-1], groups, -1)[..., which]
    return each.reshape(*values.shape[:-1], -1)


# the result


class InTurn:
    """Reads stored tensors in the order in which they will be asked for, the next one while the last is written."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        self._names: deque[str] = deque()
        self._thread = ThreadPoolExecutor(1)
        self._coming: Future[np.ndarray] | None = None

    def __enter__(self) -> InTurn:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def expect(self, names: Sequence[str]) -> None:
        """What will be read, in this order."""
        self._names.extend(names)

    def read(self, name: str) -> np.ndarray:
        """The tensor, good until the next call."""
        due = self._names.popleft()
        if due != name:
            raise ValueError(f"{name} was asked for, {due} is next")
        values = self._source.read(name) if self._coming is None else self._coming.result()
        self._coming = None
        if self._source.read_ahead and self._names:
            self._coming = self._thread.submit(self._source.read, self._names[0])
        return values


def converted_tensors(
    source: FileSource,
    config: PretrainedConfig,
    result: PretrainedConfig,
    to: str,
    dtype: str | None,
    read: Callable[[str], np.ndarray],
) -> list[tuple[TensorSource, str]]:
    """What is written, and what the source calls the tensor each is made of.

    Args:
        source: of the weights.
        config: of the source.
        result: of the result, with nothing fused.
        to: "hf" or "paddle".
        dtype: of float weights; None keeps each tensor's own.
        read: gives a stored tensor when it is written.

    Raises:
        ModelError: when the source's weights are not those of the architecture, or one has no name there.
    """
    parameters = plain_parameters(source, config)
    names = names_there(result) if to == "hf" else {part.name: (part.name, False) for part in parameters}
    nameless = [part.name for part in parameters if part.name not in names]
    if nameless:
        raise ModelError(f"{source.place}: {named(nameless, len(parameters))} without a name in Hugging Face's format")
    found: dict[str, tuple[TensorSource, str]] = {}
    for part in parameters:
        name, turned = names[part.name]
        own = stored_dtype(source, part.stored)
        target = dtype if dtype and own in TOLERANCES else own
        shape = part.shape[::-1] if turned else part.shape
        values = partial(_values, read, part, turned)
        found[name] = TensorSource(name, target, shape, values, cast=target != own), part.stored
    return list(found.values())


def names_there(config: PretrainedConfig) -> dict[str, tuple[str, bool]]:
    """PaddleNLP's name -> the one in Hugging Face's files, and whether the matrix is turned.

    Raises:
        ModelError: when PaddleNLP's table does something else to a tensor.
    """
    found = {}
    for (name, *_), mapping in hugging_face_names(find_model_class(config), config):
        if mapping.action not in (None, "transpose"):
            raise ModelError(f"{mapping.target_name}: PaddleNLP's {mapping.action!r} can't be undone")
        found[mapping.target_name] = (name, mapping.action == "transpose")
    return found


def _values(read: Callable[[str], np.ndarray], part: Plain, turned: bool) -> np.ndarray:
    values = read(part.stored)
    values = part.part(values) if part.part else values
    return values.T if turned else values
