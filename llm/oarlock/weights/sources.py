"""Sources of weights, one whole tensor at a time. (pickles.py has the one for pickles, which users have to allow.)"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from oarlock.environment.memory import check_memory, measure_available_memory
from oarlock.errors import ModelError
from oarlock.families.architecture import MoE
from oarlock.families.model_sizes import ModelSizes
from oarlock.families.registry import find_family
from oarlock.weights.buffers import populate
from oarlock.weights.hf_names import MappedTensor, find_unused, map_names
from oarlock.weights.safetensors_file import SafetensorsFile, StoredTensor
from oarlock.weights.weight_folder import WeightFolder

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight")
_READING_THREADS = 4  # they mostly wait for the disk


class WeightSource(Protocol):
    """Whole tensors under the names they have in the model on one card.

    Attributes:
        place: where the tensors come from, for messages.
        shapes: name -> shape (None if known only after reading), in the order in which reading is fastest.
        read_ahead: a second thread may read while the tensor read before is in use.
    """

    place: str
    shapes: dict[str, tuple[int, ...] | None]
    read_ahead: bool

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        """Read a whole tensor, valid until the read after the next (until the next one without read_ahead).

        Args:
            into: an array of its shape. If the source can read straight into it, it does so and returns it.

        Raises:
            ModelError: when it can't be read.
        """
        ...

    def in_place(self, name: str, into: np.ndarray) -> bool:
        """Whether read() would read straight into this array."""
        ...

    def close(self) -> None:
        """Close files and free memory."""
        ...


class FileSource(WeightSource, Protocol):
    """A WeightSource over a folder's files.

    Attributes:
        left_over: names of stored tensors that no tensor of the model comes from. They can be read too.
    """

    left_over: tuple[str, ...]


def stored_dtype(source: WeightSource, name: str) -> str:
    """NumPy's name of the stored type of a tensor. Pickled tensors are read for it."""
    return (source.dtype(name) if isinstance(source, SafetensorsSource) else source.read(name).dtype).name


class SafetensorsSource:
    """The safetensors of a folder, read into two alternating buffers, or into one without read_ahead.

    Files are not memory-mapped: their pages would count as memory of this process.
    """

    def __init__(self, folder: WeightFolder, model_class: Any, config: Any, read_ahead: bool = True) -> None:
        self.place, self.read_ahead = str(folder.folder), read_ahead
        shapes = folder.shapes()
        check_stored(config, shapes, f"{self.place}/config.json")
        self._stack = ExitStack()
        self._threads = self._stack.enter_context(ThreadPoolExecutor(_READING_THREADS))
        self._files = {path: self._open(path) for path in sorted(set(folder.files.values()))}
        self._paths = folder.files
        missing = next((name for name, path in self._paths.items() if name not in self._files[path].tensors), None)
        if missing is not None:
            raise ModelError(f"{self._paths[missing]}: {missing} should be in this file and is not")
        found = map_names(model_class, config, self._paths, folder.layout == "pt")
        places = {name: (str(self._paths[t.stored]), self._about(t).offset) for name, t in found.items()}
        in_file_order = sorted(found, key=places.__getitem__)
        self.left_over = find_unused(self._paths, found)
        quantized = next((name for name, tensor in found.items() if self._about(tensor).dtype.kind in "iub"), None)
        if quantized is not None:
            raise ModelError(
                f"{self.place}: {found[quantized].stored} is stored in {self._about(found[quantized]).dtype}: "
                "quantized weights without a description of the quantization; use the model that is not quantized"
            )
        self._tensors = {name: found[name] for name in in_file_order} | {
            name: MappedTensor(name) for name in self.left_over
        }
        self.shapes: dict[str, tuple[int, ...] | None] = {}
        for name in in_file_order:
            tensor = self._tensors[name]
            shape = self._about(tensor).shape
            # Convert a broadcast array, which takes one byte, to learn the shape.
            self.shapes[name] = shape if tensor.as_stored else tensor.convert(np.broadcast_to(np.uint8(0), shape)).shape
        self._buffers = [np.empty(0, np.uint8) for _ in range(2 if read_ahead else 1)]
        name = max(self.shapes, key=lambda name: self._about(self._tensors[name]).num_bytes, default="")
        if name:  # one tensor at a time has to fit
            about = self._about(self._tensors[name])
            what = f"{self.place}: {name} ({about.dtype.name} {list(about.shape)})"
            check_memory(about.num_bytes, what, measure_available_memory())

    def dtype(self, name: str) -> np.dtype:
        """The stored type of a tensor."""
        return self._about(self._tensors[name]).dtype

    def close(self) -> None:
        self._stack.close()
        self._buffers = []

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        tensor = self._tensors[name]
        about, path = self._about(tensor), self._paths[tensor.stored]
        if into is None or not self.in_place(name, into):
            self._buffers.reverse()
            if len(self._buffers[0]) < about.num_bytes:
                self._buffers[0] = np.empty(0, np.uint8)  # free the old one first
                self._buffers[0] = np.empty(about.num_bytes, np.uint8)
                populate(self._buffers[0])
            into = self._buffers[0][: about.num_bytes].view(about.dtype).reshape(about.shape)
        try:
            self._files[path].read(tensor.stored, 0, into, self._threads)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: {name} can't be read: {error}") from error
        return tensor.convert(into)

    def in_place(self, name: str, into: np.ndarray) -> bool:
        tensor = self._tensors[name]
        return tensor.as_stored and into.dtype == self._about(tensor).dtype and into.flags.c_contiguous

    def _open(self, path: Path) -> SafetensorsFile:
        try:
            return self._stack.enter_context(SafetensorsFile(path))
        except BaseException:
            self._stack.close()
            raise

    def _about(self, tensor: MappedTensor) -> StoredTensor:
        return self._files[self._paths[tensor.stored]].tensors[tensor.stored]


def check_stored(config: Any, shapes: Mapping[str, tuple[int, ...]], place: str) -> None:
    """Refuse a configuration with more layers, or another width or vocabulary, than the tensors in the files have.

    A model of a configuration that passes is no larger than its files. It can be constructed (without memory for
    weights)
    and compared with them name by name.

    Args:
        config: PaddleNLP's configuration.
        shapes: of the stored tensors, in either naming.
        place: of config.json, for messages.

    Raises:
        ModelError: naming the sizes on both sides.
    """
    sizes = ModelSizes.from_config(config)
    numbers = [int(found[1]) for name in shapes if (found := _LAYER.search(name))]
    layers = max(numbers, default=-1) + 1
    if sizes.num_layers > layers:
        raise ModelError(f"{place} says {sizes.num_layers:,} layers, and the weights next to it have {layers:,}")
    experts = max((int(found[1]) for name in shapes if (found := _EXPERT.search(name))), default=-1) + 1
    if sizes.experts > experts and _has_experts(config):
        raise ModelError(f"{place} says {sizes.experts:,} experts, and the weights next to it have {experts:,}")
    embedding = next((name for name in shapes if name.endswith(EMBEDDINGS)), None)
    if embedding is not None and len(shapes[embedding]) == 2 and shapes[embedding] != (sizes.vocab, sizes.hidden):
        rows, width = shapes[embedding]
        raise ModelError(
            f"{place} says a vocabulary of {sizes.vocab:,} and a hidden size of {sizes.hidden:,}, and {embedding} in "
            f"the weights next to it has {rows:,} rows of {width:,}"
        )
    widest = max((size for shape in shapes.values() for size in shape), default=0)
    for what, size in (("intermediate size", sizes.intermediate), ("size of all heads", sizes.heads * sizes.head_size)):
        if size > 3 * widest:  # up to three matrices may be stored as one
            raise ModelError(f"{place} says a {what} of {size:,}, and no tensor in the weights next to it is so large")


def _has_experts(config: Any) -> bool:
    """Whether a layer has them: all may be dense (first_k_dense_replace, mlp_only_layers, decoder_sparse_step)."""
    decoder = find_family(config.model_type).decoder
    return decoder is not None and any(isinstance(block.mlp, MoE) for block in decoder(config).blocks)
