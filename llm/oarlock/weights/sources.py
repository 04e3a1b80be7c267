"""Where weights come from, one whole tensor at a time (pickles.py: where the user allows them)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from oarlock.environment.memory import available_memory, check_memory
from oarlock.errors import ModelError
from oarlock.model_config.hf_names import OPTIONAL_PREFIXES, own_names
from oarlock.model_config.size_check import check_stored
from oarlock.parallel.family_rules import FAMILIES, ModelSizes
from oarlock.weights.prefault import populate
from oarlock.weights.safetensors_file import SafetensorsFile, StoredTensor
from oarlock.weights.weight_folder import WeightFolder

_READING_THREADS = 4  # they wait for the disk more than they compute


class WeightSource(Protocol):
    """Whole tensors under the names they have in the model on one card.

    Attributes:
        place: where that is, for messages.
        shapes: name -> shape (None where only reading tells), in the order in which reading is fastest.
        read_ahead: whether a second thread may read while what was read before is in use.
    """

    place: str
    shapes: dict[str, tuple[int, ...] | None]
    read_ahead: bool

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        """A whole tensor, good until the read after the next (until the next one without read_ahead).

        Args:
            into: an array of its shape. Where the source can read right into it, it does and returns it.

        Raises:
            ModelError: when it can't be read.
        """
        ...

    def in_place(self, name: str, into: np.ndarray) -> bool:
        """Whether read() would put the tensor into this very array."""
        ...

    def close(self) -> None:
        """Give back files and memory."""
        ...


class FileSource(WeightSource, Protocol):
    """A WeightSource over a folder's files.

    Attributes:
        left_over: names of stored tensors that no tensor of the model comes from; they can be read too.
    """

    left_over: tuple[str, ...]


class Mapped:
    """A tensor of a file and what makes it the model's."""

    def __init__(self, stored: str, mapping: Any = None) -> None:
        self.stored = stored
        self._mapping = mapping if mapping is not None and mapping.action is not None else None

    @property
    def as_stored(self) -> bool:
        """Whether nothing has to be done to it."""
        return self._mapping is None

    def convert(self, array: np.ndarray) -> np.ndarray:
        """From Hugging Face's layout to Paddle's (PaddleNLP's StateDictNameMapping says how); mostly a view."""
        return array if self._mapping is None else self._mapping.run({self.stored: array}, self.stored)


def mapped(model_class: Any, config: Any, stored: Mapping[str, Any], hugging_face: bool) -> dict[str, Mapped]:
    """The model's name of a tensor -> where it is in the files.

    Raises:
        ModelError: for a family that can't be read from Hugging Face's format.
    """
    if not hugging_face:
        return {name: Mapped(name) for name in stored}
    family = FAMILIES.get(config.model_type)
    if family is not None and not family.hugging_face:
        why = family.lacks(config.model_type, "hugging_face", "names of Hugging Face's format")
        raise ModelError(f"weights in Hugging Face's format: {why}; give them in Paddle's format")
    found = {}
    for names, mapping in hugging_face_names(model_class, config):
        mapping.source_name = next((name for name in names if name in stored), None)
        if mapping.source_name:
            found[mapping.target_name] = Mapped(mapping.source_name, mapping)
    return found


def left_over(stored: Iterable[str], found: Mapping[str, Mapped]) -> tuple[str, ...]:
    """Names in the files that no tensor of the model comes from."""
    used = {tensor.stored for tensor in found.values()}
    return tuple(sorted(name for name in stored if name not in used))


def stored_dtype(source: WeightSource, name: str) -> str:
    """NumPy's name of the type of a tensor in the files. What is pickled has to be read for it."""
    return (source.dtype(name) if isinstance(source, SafetensorsSource) else source.read(name).dtype).name


def hugging_face_names(model_class: Any, config: Any) -> list[tuple[tuple[str, ...], Any]]:
    """What a tensor may be called in Hugging Face's files, and PaddleNLP's StateDictNameMapping for it.

    Those of ChatGLM2 lack the prefixes of both sides (paddlenlp 3.0.0b4).

    Returns:
        The first of the names is what Hugging Face's own models write.

    Raises:
        ModelError: for a family without them.
    """
    family = config.model_type
    if family in OPTIONAL_PREFIXES:
        return list(_names_with_prefix(model_class, config, OPTIONAL_PREFIXES[family]))
    return _paddlenlp_names(model_class, config)


def _names_with_prefix(model_class: Any, config: Any, prefix: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    from paddlenlp.transformers.conversion_utils import StateDictNameMapping

    own = own_names(config.model_type, ModelSizes.of(config).num_layers, bool(config.tie_word_embeddings))
    found = (
        _paddlenlp_names(model_class, config)
        if own is None
        else [
            ((there,), StateDictNameMapping(there, here, "transpose" if turned else None))
            for there, here, turned in own
        ]
    )
    for (name, *_), mapping in found:
        yield (name, name.removeprefix(prefix)) if name.startswith(prefix) else (name,), mapping


def _paddlenlp_names(model_class: Any, config: Any) -> list[tuple[tuple[str, ...], Any]]:
    try:
        mappings = model_class._get_name_mappings(config)
    except (NotImplementedError, ImportError) as error:
        raise ModelError(
            f"PaddleNLP can't read Hugging Face weights of {model_class.__name__}: give them in Paddle's format"
        ) from error
    prefix = f"{model_class.base_model_prefix}."
    bare = not any(mapping.target_name.startswith(prefix) for mapping in mappings)
    found: list[tuple[tuple[str, ...], Any]] = []
    for mapping in mappings:
        names = (mapping.source_name, f"transformer.{mapping.source_name}") if bare else (mapping.source_name,)
        mapping.target_name = f"{prefix}{mapping.target_name}" if bare else mapping.target_name
        found.append((names, mapping))
    return found


class SafetensorsSource:
    """The safetensors of a folder, read with plain reads into two buffers in turn, or into one without read_ahead.

    Nothing is mapped: pages of a mapped file count as memory of this process, up to the whole file.
    """

    def __init__(self, folder: WeightFolder, model_class: Any, config: Any, read_ahead: bool = True) -> None:
        self.place, self.read_ahead = str(folder.folder), read_ahead
        shapes = folder.shapes()
        check_stored(config, shapes, f"{self.place}/config.json")
        self._stack = ExitStack()
        self._threads = self._stack.enter_context(ThreadPoolExecutor(_READING_THREADS))
        self._files = {path: self._opened(path) for path in sorted(set(folder.files.values()))}
        self._paths = folder.files
        gone = next((name for name, path in self._paths.items() if name not in self._files[path].tensors), None)
        if gone is not None:
            raise ModelError(f"{self._paths[gone]}: {gone} should be in this file and is not")
        found = mapped(model_class, config, self._paths, folder.layout == "pt")
        in_file_order = sorted(found, key=lambda name: self._position(found[name]))
        self.left_over = left_over(self._paths, found)
        whole = next((name for name, tensor in found.items() if self._about(tensor).dtype.kind in "iub"), None)
        if whole is not None:
            raise ModelError(
                f"{self.place}: {found[whole].stored} is stored in {self._about(found[whole]).dtype}: quantised "
                "weights, without anything that says how; take the plain model"
            )
        self._tensors = {name: found[name] for name in in_file_order} | {name: Mapped(name) for name in self.left_over}
        self.shapes: dict[str, tuple[int, ...] | None] = {name: self._shape(name) for name in in_file_order}
        self._buffers = [np.empty(0, np.uint8) for _ in range(2 if read_ahead else 1)]
        self._check_room()

    def _check_room(self) -> None:
        """Refuse tensors that are too large to be read one at a time."""
        name = max(self.shapes, key=lambda name: self._about(self._tensors[name]).num_bytes, default="")
        if name:
            about = self._about(self._tensors[name])
            what = f"{self.place}: {name} ({about.dtype.name} {list(about.shape)})"
            check_memory(about.num_bytes, what, available_memory())

    def dtype(self, name: str) -> np.dtype:
        """In which a tensor is stored."""
        return self._about(self._tensors[name]).dtype

    def close(self) -> None:
        """See WeightSource."""
        self._stack.close()
        self._buffers = []

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        """See WeightSource."""
        tensor = self._tensors[name]
        about, path = self._about(tensor), self._paths[tensor.stored]
        if into is None or not self.in_place(name, into):
            self._buffers.reverse()
            if len(self._buffers[0]) < about.num_bytes:
                self._buffers[0] = np.empty(0, np.uint8)  # give the old one back first
                self._buffers[0] = np.empty(about.num_bytes, np.uint8)
                populate(self._buffers[0])
            into = self._buffers[0][: about.num_bytes].view(about.dtype).reshape(about.shape)
        try:
            self._files[path].read(tensor.stored, 0, into, self._threads)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: {name} can't be read: {error}") from error
        return tensor.convert(into)

    def in_place(self, name: str, into: np.ndarray) -> bool:
        """See WeightSource."""
        tensor = self._tensors[name]
        return tensor.as_stored and into.dtype == self._about(tensor).dtype and into.flags.c_contiguous

    def _opened(self, path: Path) -> SafetensorsFile:
        try:
            return self._stack.enter_context(SafetensorsFile(path))
        except BaseException:
            self._stack.close()
            raise

    def _about(self, tensor: Mapped) -> StoredTensor:
        return self._files[self._paths[tensor.stored]].tensors[tensor.stored]

    def _position(self, tensor: Mapped) -> tuple[str, int]:
        return str(self._paths[tensor.stored]), self._about(tensor).offset

    def _shape(self, name: str) -> tuple[int, ...]:
        tensor = self._tensors[name]
        shape = self._about(tensor).shape
        # An array of that shape that takes one byte shows what the conversion makes of it.
        return shape if tensor.as_stored else tensor.convert(np.broadcast_to(np.uint8(0), shape)).shape
