"""The tensors of a converted model: their names there, and how their values are read.

Both layouts are mapped to the parameters of the model on one device, none of them packed; matrices are [in, out].
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import numpy as np
from paddle.base.framework import EagerParamBase
from paddlenlp.transformers import PretrainedConfig

from oarlock.errors import ModelError
from oarlock.model_config.load import find_model_class
from oarlock.models.layer_offload import make_empty_model
from oarlock.models.open_weights import _describe_names
from oarlock.models.proof import TOLERANCES
from oarlock.weights.hf_names import list_hf_names
from oarlock.weights.layout import parameter_shards
from oarlock.weights.safetensors_file import TensorSource
from oarlock.weights.sources import FileSource, stored_dtype


@dataclass(frozen=True)
class UnfusedParameter:
    """A parameter of the model on one device.

    Attributes:
        name, shape: in that model.
        stored: name of the source's tensor that holds it.
        cut: slices it out of that tensor; None if the tensor holds nothing else.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    cut: Callable[[np.ndarray], np.ndarray] | None = None


def unfuse_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a configuration with unfused projections."""
    plain = copy.deepcopy(config)
    for name in ("fuse_attention_qkv", "fuse_attention_ffn"):
        if getattr(plain, name, False):
            setattr(plain, name, False)
    return plain


def list_unfused_parameters(source: FileSource, config: PretrainedConfig) -> list[UnfusedParameter]:
    """List all parameters in the order in which the source is read fastest.

    Raises:
        ModelError: when one is missing or has another shape. (open_weights refuses unknown tensors.)
    """
    stored = list_parameter_shapes(config)
    parts = {part.name: part for name, shape in stored.items() for part in split_fused_parameter(name, shape, config)}
    fused = any(part.cut is not None for part in parts.values())
    wanted = list_parameter_shapes(unfuse_config(config)) if fused else stored
    lacking = [name for name in wanted if parts.get(name) is None or parts[name].stored not in source.shapes]
    if lacking:
        raise ModelError(f"{source.place}: {_describe_names(lacking, len(wanted))} missing; nothing was written")
    for name, shape in stored.items():
        found = source.shapes.get(name)
        if found is not None and found != shape:
            raise ModelError(f"{source.place}: {name} has shape {list(found)}, but by config.json it is {list(shape)}")
    order = {name: i for i, name in enumerate(source.shapes)}
    return sorted((parts[name] for name in wanted), key=lambda part: order[part.stored])


def list_parameter_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Map the parameters of the model to their shapes."""
    held = parameter_shards(make_empty_model(find_model_class(config), config))
    return {parameter.name: parameter.slice.shape for parameter in held if isinstance(parameter.tensor, EagerParamBase)}


# fused inputs


def split_fused_parameter(name: str, shape: tuple[int, ...], config: PretrainedConfig) -> Iterator[UnfusedParameter]:
    """Yield the unfused parameters that a parameter of the source's model holds."""
    layer, _, kind = name.rpartition(".")
    path, _, last = layer.rpartition(".")
    width = shape[-1] if shape else 0
    if last == "gate_up_fused_proj":  # [gate | up]
        for i, own in enumerate(("gate_proj", "up_proj")):
            half = slice(i * width // 2, (i + 1) * width // 2)
            yield UnfusedParameter(f"{path}.{own}.{kind}", (*shape[:-1], width // 2), name, itemgetter((..., half)))
    elif last == "qkv_proj" and config.fuse_attention_qkv:  # per head of keys and values: [its queries, key, value]
        groups = config.num_key_value_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries = config.num_attention_heads // groups * head
        for own, begin, size in (("q", 0, queries), ("k", queries, head), ("v", queries + head, head)):
            cut = partial(_slice_groups, groups, slice(begin, begin + size))
            yield UnfusedParameter(f"{path}.{own}_proj.{kind}", (*shape[:-1], groups * size), name, cut)
    else:
        yield UnfusedParameter(name, shape, name)


def _slice_groups(groups: int, which: slice, values: np.ndarray) -> np.ndarray:
    each = values.reshape(*values.shape[:-1], groups, -1)[..., which]
    return each.reshape(*values.shape[:-1], -1)


# the converted model


class OrderedReader:
    """Reads tensors in an order known in advance: the next one is read while the last one is written."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        self._names: deque[str] = deque()
        self._thread = ThreadPoolExecutor(1)
        self._coming: Future[np.ndarray] | None = None

    def __enter__(self) -> OrderedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def expect(self, names: Sequence[str]) -> None:
        """Announce the tensors that will be read next, in their order."""
        self._names.extend(names)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor. It is valid until the next call."""
        due = self._names.popleft()
        if due != name:
            raise ValueError(f"{name} was requested, but {due} is next")
        values = self._source.read(name) if self._coming is None else self._coming.result()
        self._coming = None
        if self._source.read_ahead and self._names:
            self._coming = self._thread.submit(self._source.read, self._names[0])
        return values


def list_converted_tensors(
    source: FileSource,
    config: PretrainedConfig,
    result: PretrainedConfig,
    to: str,
    dtype: str | None,
    read: Callable[[str], np.ndarray],
) -> list[tuple[TensorSource, str]]:
    """List the tensors to write, each with the name of the source's tensor that it is made of.

    Args:
        source: the weights.
        config: configuration of the source.
        result: configuration of the result, unfused.
        to: "hf" or "paddle".
        dtype: type of float weights; None keeps that of each tensor.
        read: reads a tensor of the source at the time it is written.

    Raises:
        ModelError: when the source's weights are not those of the architecture, or one has no name in the result.
    """
    parameters = list_unfused_parameters(source, config)
    names = map_hf_names(result) if to == "hf" else {part.name: (part.name, False) for part in parameters}
    nameless = [part.name for part in parameters if part.name not in names]
    if nameless:
        raise ModelError(
            f"{source.place}: {_describe_names(nameless, len(parameters))} no name in Hugging Face's format"
        )
    found: dict[str, tuple[TensorSource, str]] = {}
    for part in parameters:
        name, transposed = names[part.name]
        own = stored_dtype(source, part.stored)
        target = dtype if dtype and own in TOLERANCES else own
        shape = part.shape[::-1] if transposed else part.shape
        values = partial(_read_converted, read, part, transposed)
        found[name] = TensorSource(name, target, shape, values, cast=target != own), part.stored
    return list(found.values())


def map_hf_names(config: PretrainedConfig) -> dict[str, tuple[str, bool]]:
    """Map our names to those in Hugging Face's files, with whether the matrix is transposed there.

    Raises:
        ModelError: when PaddleNLP changes a tensor in another way.
    """
    found = {}
    for (name, *_), mapping in list_hf_names(find_model_class(config), config):
        if mapping.action not in (None, "transpose"):
            raise ModelError(f"{mapping.target_name}: PaddleNLP's {mapping.action!r} can't be reversed")
        found[mapping.target_name] = (name, mapping.action == "transpose")
    return found


def _read_converted(read: Callable[[str], np.ndarray], part: UnfusedParameter, transposed: bool) -> np.ndarray:
    values = read(part.stored)
    values = part.cut(values) if part.cut else values
    return values.T if transposed else values
