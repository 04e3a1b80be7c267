"""The weight files of a folder: which they are when several might be, their layout, and what their headers say.

Nothing is written into the folder (PaddleNLP's own conversion does), and torch is not needed. A folder with two sets of
weights is refused. The rules, in this order:

1. The weights are an index (model.safetensors.index.json) and the shards it names, or model.safetensors, or shards of
   one set without an index. Any other of these in the folder is a second set.
2. model.safetensors and pickles of the same weights (as hubs ship them) are one set. The safetensors are read, and a
   message says so. They are compared without unpickling: by sizes and checksums in torch's zip archives, else by the
   size of the file.
3. Meta's and Mistral's own form (consolidated*, original/), variants (model.fp16.safetensors), and TensorFlow, Flax and
   GGUF files are not read, as in transformers, and a message says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from oarlock.environment.console import log_once
from oarlock.errors import ModelError
from oarlock.families.registry import FAMILIES
from oarlock.files import PEFT_WEIGHTS
from oarlock.formats.files import open_regular
from oarlock.formats.safetensors_header import Header, read_header
from oarlock.weights.pickle_duplicates import find_differing_pickle
from oarlock.weights.weight_index import read_index

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
PICKLES = (
    "model_state.pdparams",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model_state.pdparams.index.json",
)
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_PICKLE_FILES = ("pytorch_model*.bin", "model_state*.pdparams")
_NOT_READ = (
    "consolidated*",
    "original",
    "*.gguf",
    "tf_model.h5",
    "flax_model.msgpack",
    "*.index.*.json",
    "*.safetensors",
)
_PADDLE_NAMES = tuple(f"{family}." for family in FAMILIES)
_EMBEDDING = "embed_tokens.weight"
_TO_WIDTH = (
    "down_proj.weight",
    "w2.weight",
    "o_proj.weight",
    "fc2.weight",
)  # matrices whose output is the layers' width
_PROJECTIONS = (*_TO_WIDTH, "gate_proj.weight", "gate_up_proj.weight", "w1.weight", "k_proj.weight", "fc1.weight")
_LAYOUTS = {"np": "np", "pt": "pt", "mlx": "pt"}  # MLX keeps transformers' names and matrices


@dataclass(frozen=True)
class WeightFolder:
    """The safetensors weights of one folder, by their headers.

    Attributes:
        files: tensor name -> file that holds it.
        layout: "pt" (Hugging Face: [out, in] matrices, model.* names) or "np" (Paddle: [in, out]).
    """

    folder: Path
    files: dict[str, Path]
    layout: str

    @classmethod
    def open(cls, folder: str | Path) -> WeightFolder:
        """Find the tensors.

        Raises:
            ModelError: for missing or damaged files, two sets of weights, or pickles only.
        """
        folder = Path(folder)
        return cls(folder, *find_weights(folder))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors as they are stored.

        Raises:
            ModelError: for damaged files.
        """
        return {name: read_header_of(path).tensors[name].shape for name, path in self.files.items()}


def has_safetensors(folder: str | Path) -> bool:
    """Check whether a folder holds weights as safetensors."""
    return (Path(folder) / INDEX_NAME).is_file() or any(Path(folder).glob("model*.safetensors"))


def find_weights(folder: Path) -> tuple[dict[str, Path], str]:
    """Find the tensors of a folder's safetensors.

    Returns:
        Tensor name -> file, and the layout of all: "pt" (Hugging Face's) or "np" (Paddle's).

    Raises:
        ModelError: for two sets of weights, missing or damaged files, those of another framework, or pickles only.
    """
    index = folder / INDEX_NAME
    files = _find_by_index(index) if index.is_file() else _find_without_index(folder)
    layout = _detect_layout(files)
    _check_other_files(folder, set(files.values()))
    return files, layout


def _find_by_index(index: Path) -> dict[str, Path]:
    folder = index.parent
    weight_map = read_index(index)
    named = set(weight_map.values())
    missing = sorted(file for file in named if not (folder / file).is_file())
    if missing:
        raise ModelError(f"{folder}: {INDEX_NAME} names {', '.join(missing)}, which does not exist")
    others = sorted({path.name for path in _list_candidates(folder)} - named)
    if others:
        _refuse_two_sets(
            folder, INDEX_NAME, f"({', '.join(sorted(named)[:2])}{', ...' if len(named) > 2 else ''}) ", others
        )
    stored = {file: set(read_header_of(folder / file).tensors) for file in sorted(named)}
    for name, file in weight_map.items():
        if name not in stored[file]:
            raise ModelError(f"{folder / file}: {name} is missing from this file")
    for file, names in stored.items():
        loose = sorted(name for name in names if weight_map.get(name) != file)
        if loose:
            raise ModelError(f"{folder / file}: it holds {loose[0]}, which {INDEX_NAME} does not list there")
    return {name: folder / file for name, file in weight_map.items()}


def _find_without_index(folder: Path) -> dict[str, Path]:
    paths = _list_candidates(folder)
    if not paths:
        raise ModelError(_explain_missing(folder))
    single = folder / SINGLE_NAME
    shards = [path for path in paths if path != single]
    if single in paths and shards:
        _refuse_two_sets(folder, SINGLE_NAME, "", [path.name for path in shards])
    cuts: dict[int, list[Path]] = {}
    for path in shards:
        cuts.setdefault(_parse_number(path, 2), []).append(path)
    if len(cuts) > 1:
        first, *others = (paths[0].name for _, paths in sorted(cuts.items()))
        _refuse_two_sets(folder, first, "", others)
    for total, found in cuts.items():
        gone = sorted(set(range(1, total + 1)) - {_parse_number(path, 1) for path in found})
        if gone or len(found) != total:
            raise ModelError(f"{folder}: {found[0].name} is one of {total} files, but {len(found)} exist")
    files: dict[str, Path] = {}
    for path in paths:
        for name in read_header_of(path).tensors:
            if name in files:
                raise ModelError(
                    f"{folder}: {name} is in {files[name].name} and in {path.name}, and no index says which one to use"
                )
            files[name] = path
    return files


def _list_candidates(folder: Path) -> list[Path]:
    """List model.safetensors and its shards."""
    return sorted(
        path for path in folder.glob("model*.safetensors") if path.name == SINGLE_NAME or _SHARD.fullmatch(path.name)
    )


def _parse_number(path: Path, group: int) -> int:
    match = _SHARD.fullmatch(path.name)
    assert match is not None
    return int(match.group(group))


def _refuse_two_sets(folder: Path, one: str, about: str, others: list[str]) -> None:
    shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    raise ModelError(
        f"{folder}: two sets of weights: {one} {about}and {shown}. Programs choose differently: remove one of them"
    )


def read_header_of(path: Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        ModelError: when the file is not one, damaged, or truncated.
    """
    try:
        state = path.stat()
        return _header(path, (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except ModelError:
        is_pointer = False
        with suppress(OSError, ModelError), open_regular(path) as file:
            is_pointer = file.read(24) == b"version https://git-lfs."
        if is_pointer:
            raise ModelError(f"{path}: a Git LFS pointer, not the file itself; fetch it with git lfs pull") from None
        raise


@lru_cache(maxsize=512)
def _header(path: Path, state: object) -> Header:
    return read_header(path)


def _detect_layout(files: Mapping[str, Path]) -> str:
    """Detect the layout from the headers and, where they don't say, from names and shapes.

    Families of our own decoder have the same names in both layouts.
    """
    found: dict[str, Path] = {}
    by_shape = _detect_by_shapes(files)
    for path in sorted(set(files.values())):
        names = [name for name, place in files.items() if place == path]
        said = read_header_of(path).metadata.get("format")
        if said is not None and said not in _LAYOUTS:
            raise ModelError(
                f"{path}: written for another framework (format {said!r} in its header): use the files for PyTorch or "
                "Paddle"
            )
        # None where both layouts have such names.
        telling = next((name for name in names if name.startswith((*_PADDLE_NAMES, "model."))), None)
        by_name = None if telling is None else "np" if telling.startswith(_PADDLE_NAMES) else by_shape
        if said is None and by_name is None and any(name.endswith(_PROJECTIONS) for name in names):
            raise ModelError(
                f"{path}: it is unknown whether its matrices are [in, out] or [out, in]: its header names no format "
                "(np or pt), and its shapes fit both"
            )
        layout = by_name or "pt" if said is None else _LAYOUTS[said]
        if by_name not in (None, layout):
            example = min(names)
            raise ModelError(
                f"{path}: its header says format {said!r}, and its tensors have names or shapes of the other layout "
                f"({example})"
            )
        found.setdefault(layout, path)
    if len(found) > 1:
        one, other = found.values()
        raise ModelError(
            f"{one} and {other}: one is in Paddle's layout, the other in Hugging Face's: two sets of weights"
        )
    return next(iter(found), "pt")


def _detect_by_shapes(files: Mapping[str, Path]) -> str | None:
    """Detect the layout from the matrices between the layers' width and another one; None if none decides."""
    shapes = {name: read_header_of(path).tensors[name].shape for name, path in files.items()}
    embedding = next((shape for name, shape in shapes.items() if name.endswith(_EMBEDDING) and len(shape) == 2), None)
    for name, shape in shapes.items():
        inner = next((own for own in _PROJECTIONS if name.endswith(own)), None)
        if embedding is None or inner is None or len(shape) != 2 or shape[0] == shape[1]:
            continue
        if embedding[1] in shape:
            return "pt" if (shape[0] == embedding[1]) == (inner in _TO_WIDTH) else "np"
    return None


def _check_other_files(folder: Path, used: set[Path]) -> None:
    """Refuse a second set in another format. Log what is not read."""
    if (folder / PEFT_WEIGHTS).is_file():
        _refuse_two_sets(folder, min(path.name for path in used), "", [PEFT_WEIGHTS])
    taken = INDEX_NAME if (folder / INDEX_NAME).is_file() else min(path.name for path in used)
    pickles = sorted({path for pattern in _PICKLE_FILES for path in folder.glob(pattern) if path.is_file()})
    if pickles:
        stamp = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in (*sorted(used), *pickles))
        other = _find_differing(tuple(sorted(used)), tuple(pickles), stamp)
        if other is not None:
            _refuse_two_sets(folder, taken, "", [other])
    beside = {path for pattern in _NOT_READ for path in folder.glob(pattern)} - used - {folder / INDEX_NAME}
    left = sorted({path.name for path in (*beside, *pickles)})
    if left:
        log_once(f"{folder}: {taken} is read; not read: {', '.join(left[:6])}{', ...' if len(left) > 6 else ''}")


@cache
def _find_differing(used: tuple[Path, ...], pickles: tuple[Path, ...], stamp: object) -> str | None:
    return find_differing_pickle(used, pickles)


def _explain_missing(folder: Path) -> str:
    pickles = [name for name in PICKLES if (folder / name).exists()]
    if pickles:
        return (
            f"{folder}: weights only as {', '.join(pickles)}, a pickle format that can run code when opened. If you "
            "trust its source, add --allow_pickle_weights"
        )
    if not folder.is_dir():
        return f"{folder}: no such folder"
    others: Counter[str] = Counter()
    with suppress(OSError):
        others.update(
            path.name for pattern in ("*.safetensors", "*.gguf", "*.pth", "*.ckpt") for path in folder.glob(pattern)
        )
    found = f"; {', '.join(sorted(others)[:3])} is not read" if others else ""
    return f"{folder}: no {SINGLE_NAME} (or index of shards) in this folder{found}"
