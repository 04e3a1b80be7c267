"""Where weights come from, one whole tensor at a time: safetensors files, and pickles where the user allows them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from oarlock.errors import ModelError
from oarlock.models.weights import WeightFolder
from oarlock.parallel.families import FAMILIES

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_AHEAD = 32 << 20  # bytes that the system is asked to have ready
_MAX_READ = 8 << 20  # bytes a call: larger ones get slower where the file is not in memory yet
_PADDLE_PICKLE, _TORCH_PICKLE = "model_state.pdparams", "pytorch_model.bin"


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


class _Mapped:
    """A tensor of a file and what makes it the model's."""

    def __init__(self, stored: str, mapping: Any = None) -> None:
        self.stored = stored
        self._mapping = mapping if mapping is not None and mapping.action is not None else None

    @property
    def as_stored(self) -> bool:
        return self._mapping is None

    def convert(self, array: np.ndarray) -> np.ndarray:
        """From Hugging Face's layout to Paddle's (PaddleNLP's StateDictNameMapping says how); mostly a view."""
        return array if self._mapping is None else self._mapping.run({self.stored: array}, self.stored)


def _mapped(model_class: Any, config: Any, stored: Mapping[str, Any], hugging_face: bool) -> dict[str, _Mapped]:
    """The model's name of a tensor -> where it is in the files.

    Raises:
        ModelError: for a family that can't be read from Hugging Face's format.
    """
    if not hugging_face:
        return {name: _Mapped(name) for name in stored}
    family = FAMILIES.get(config.model_type)
    if family is not None and not family.hugging_face:
        why = family.lacks(config.model_type, "hugging_face", "names of Hugging Face's format")
        raise ModelError(f"weights in Hugging Face's format: {why}; give them in Paddle's format")
    found = {}
    for names, mapping in hugging_face_names(model_class, config):
        mapping.source_name = next((name for name in names if name in stored), None)
        if mapping.source_name:
            found[mapping.target_name] = _Mapped(mapping.source_name, mapping)
    return found


def hugging_face_names(model_class: Any, config: Any) -> list[tuple[tuple[str, ...], Any]]:
    """What a tensor may be called in Hugging Face's files, and PaddleNLP's StateDictNameMapping for it.

    Those of ChatGLM2 lack the prefixes of both sides (paddlenlp 3.0.0b4).

    Raises:
        ModelError: for a family without them.
    """
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


@dataclass(frozen=True)
class _Entry:
    """Where the bytes of a tensor are."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsSource:
    """The safetensors of a folder, read with plain reads into two buffers in turn, or into one without read_ahead.

    Nothing is mapped: pages of a mapped file count as memory of this process, up to the whole file.
    """

    def __init__(self, folder: WeightFolder, model_class: Any, config: Any, read_ahead: bool = True) -> None:
        self.place, self.read_ahead = str(folder.folder), read_ahead
        self._entries = _all_entries(folder)
        found = _mapped(model_class, config, self._entries, folder.layout == "pt")
        in_file_order = sorted(found, key=lambda name: self._position(found[name]))
        self._tensors = {name: found[name] for name in in_file_order}
        self.shapes: dict[str, tuple[int, ...] | None] = {name: self._shape(name) for name in in_file_order}
        self._buffers = [np.empty(0, np.uint8) for _ in range(2 if read_ahead else 1)]
        self._files: dict[Path, int] = {}
        self._stack = ExitStack()

    def dtype(self, name: str) -> np.dtype:
        """In which a tensor is stored."""
        return self._entries[self._tensors[name].stored].dtype

    def close(self) -> None:
        """See WeightSource."""
        self._stack.close()
        self._buffers = []

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        """See WeightSource."""
        tensor = self._tensors[name]
        entry = self._entries[tensor.stored]
        if into is None or not self.in_place(name, into):
            self._buffers.reverse()
            if len(self._buffers[0]) < entry.num_bytes:
                self._buffers[0] = np.empty(0, np.uint8)  # give the old one back first
                self._buffers[0] = np.empty(entry.num_bytes, np.uint8)
            into = self._buffers[0][: entry.num_bytes].view(entry.dtype).reshape(entry.shape)
        self._fill(name, entry, into)
        return tensor.convert(into)

    def in_place(self, name: str, into: np.ndarray) -> bool:
        """See WeightSource."""
        tensor = self._tensors[name]
        return tensor.as_stored and into.dtype == self._entries[tensor.stored].dtype and into.flags.c_contiguous

    def _fill(self, name: str, entry: _Entry, array: np.ndarray) -> None:
        rest, offset = array.reshape(-1).view(np.uint8).data, entry.offset
        try:
            if entry.path not in self._files:
                self._files[entry.path] = os.open(entry.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                self._stack.callback(os.close, self._files[entry.path])
            while rest:
                if hasattr(os, "posix_fadvise"):  # the disk goes on while this thread copies, or does something else
                    os.posix_fadvise(self._files[entry.path], offset, _AHEAD, os.POSIX_FADV_WILLNEED)
                done = os.preadv(self._files[entry.path], [rest[:_MAX_READ]], offset)
                if not done:
                    raise EOFError("the file ends before it")
                rest, offset = rest[done:], offset + done
        except (OSError, EOFError) as error:
            raise ModelError(f"{entry.path}: {name} can't be read: {error}") from error

    def _position(self, tensor: _Mapped) -> tuple[str, int]:
        entry = self._entries[tensor.stored]
        return str(entry.path), entry.offset

    def _shape(self, name: str) -> tuple[int, ...]:
        tensor = self._tensors[name]
        shape = self._entries[tensor.stored].shape
        # An array of that shape that takes one byte shows what the conversion makes of it.
        return shape if tensor.as_stored else tensor.convert(np.broadcast_to(np.uint8(0), shape)).shape


def _all_entries(folder: WeightFolder) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for path in sorted(set(folder.files.values())):
        entries |= _read_header(path)
    gone = next((name for name in folder.files if name not in entries), None)
    if gone is not None:
        raise ModelError(f"{folder.files[gone]}: {gone} should be in this file and is not")
    return {name: entries[name] for name in folder.files}


def _read_header(path: Path) -> dict[str, _Entry]:
    """The tensors of a file (https://github.com/huggingface/safetensors#format).

    Raises:
        ModelError: when it is damaged, or shorter than its header says.
    """
    entries = {}
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError("no header")
            header = json.loads(file.read(length))
        for name, about in header.items():
            if name == "__metadata__":
                continue
            if about["dtype"] not in _DTYPES:
                raise ValueError(f"{name} is of type {about['dtype']}, which training can't use")
            dtype, shape = np.dtype(_DTYPES[about["dtype"]]), tuple(map(int, about["shape"]))
            begin, end = about["data_offsets"]
            if end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
                raise ValueError(f"{name} is not all there")
            entries[name] = _Entry(path, dtype, shape, 8 + length + begin, end - begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from error
    return entries


class PickleSource:
    """Pickled weights (model_state.pdparams, pytorch_model.bin, or shards of them), a file at a time in memory.

    Only for folders that the user trusts: unpickling can run code.
    """

    read_ahead = False

    def __init__(self, folder: Path, model_class: Any, config: Any) -> None:
        self.place = str(folder)
        kind = next((name for name in (_PADDLE_PICKLE, _TORCH_PICKLE) if _has(folder, name)), None)
        if kind is None:
            raise ModelError(
                f"{folder}: neither {_PADDLE_PICKLE} nor {_TORCH_PICKLE} (or their indices) in this folder"
            )
        self._unpickle = _unpickle_paddle if kind == _PADDLE_PICKLE else _unpickle_torch
        self._file: Path | None = None
        self._arrays: dict[str, np.ndarray] = {}
        index = folder / f"{kind}.index.json"
        if (folder / kind).is_file():
            self._load(folder / kind)
            files = dict.fromkeys(self._arrays, folder / kind)
        else:
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = {name: folder / file for name, file in weight_map.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{index}: not an index of weight files: {error!r}") from error
        found = _mapped(model_class, config, files, kind == _TORCH_PICKLE)
        self._files = files
        self._tensors = {name: found[name] for name in sorted(found, key=lambda name: files[found[name].stored])}
        self.shapes: dict[str, tuple[int, ...] | None] = {name: self._known_shape(name) for name in self._tensors}

    def close(self) -> None:
        """See WeightSource."""
        self._arrays = {}

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        """See WeightSource."""
        tensor = self._tensors[name]
        self._load(self._files[tensor.stored])
        if tensor.stored not in self._arrays:
            raise ModelError(f"{self._files[tensor.stored]}: {tensor.stored} should be in this file and is not")
        return tensor.convert(self._arrays[tensor.stored])

    def in_place(self, name: str, into: np.ndarray) -> bool:
        """See WeightSource."""
        return False

    def _load(self, path: Path) -> None:
        if path == self._file:
            return
        self._arrays, self._file = {}, path
        try:
            content = self._unpickle(path)
        except Exception as error:  # a pickle can raise anything
            raise ModelError(f"{path}: can't be read: {error!r}") from error
        for name, array in content.items():
            if isinstance(array, np.ndarray):  # both formats give bfloat16 as its bits
                self._arrays[name] = array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array

    def _known_shape(self, name: str) -> tuple[int, ...] | None:
        tensor = self._tensors[name]
        array = self._arrays.get(tensor.stored)
        return None if array is None else tensor.convert(array).shape


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file() or (folder / f"{name}.index.json").is_file()


def _unpickle_paddle(path: Path) -> dict[str, Any]:
    import paddle

    return paddle.load(str(path), return_numpy=True)


def _unpickle_torch(path: Path) -> dict[str, Any]:
    from paddlenlp.utils.serialization import load_torch

    loader: Callable[[str], dict[str, Any]] = load_torch
    return loader(str(path))
