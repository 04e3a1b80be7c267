"""Resolving --dataset_name_or_path: a file, a folder, a dataset saved to disk, or one of a hub.

The files of a folder are assigned to train and dev by their names. Saved datasets and those of a hub are read with the
library `datasets` of Hugging Face.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from oarlock.data.files.find_files import LeftOut, detect_source, list_files
from oarlock.data.records.record_stream import FileRecords, RecordSource, RowRecords
from oarlock.errors import DataError, first_line
from oarlock.formats.json_file import read_json_if_there
from oarlock.formats.names import find_name_problem

_TRAIN_NAMES = ("train", "training")
_DEV_NAMES = ("dev", "validation", "valid", "val", "eval", "evaluation", "test")
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")  # of LLaMA-Factory and Hugging Face


@dataclass
class RecordSources:
    """The sources of --dataset_name_or_path.

    Attributes:
        dev: empty if there is none.
        left_out: files of the folder that were skipped.
    """

    train: list[RecordSource]
    dev: list[RecordSource] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)


def find_records(name: str) -> RecordSources:
    """Find the sources of a file, a folder, a dataset saved to disk, or a dataset of a hub.

    Raises:
        DataError: if there is none.
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        return RecordSources([FileRecords.detect(path)])
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _load_saved_dataset(path)
    if half := next((end for end in (".bin", ".idx") if path.with_name(path.name + end).is_file()), None):
        raise DataError(f"{name}{half} is half of a corpus: {name}{'.idx' if half == '.bin' else '.bin'} is missing")
    return _find_in_folder(path) if path.is_dir() else _load_hub_dataset(name)


def _find_in_folder(folder: Path) -> RecordSources:
    left_out = LeftOut()
    sides: dict[str, list[Path]] = {}
    for path in list_files(folder, left_out):
        problem = detect_source(path)
        stem = _get_stem(path)
        if path.name in _DESCRIPTIONS:
            left_out.add(path, "describes data, but contains no records")
        elif isinstance(problem, str) or stem is None:
            left_out.add(path, problem if isinstance(problem, str) else "not a data file")
        else:
            sides.setdefault(_detect_side((*path.relative_to(folder).parts[:-1], stem)), []).append(path)
    train_side = "train" if "train" in sides else ""
    dev_side = next((name for name in _DEV_NAMES if name in sides), None)
    train, dev = sides.pop(train_side, []), sides.pop(dev_side, []) if dev_side else []
    if not train:
        skipped = f"\n{left_out.text()}" if left_out.count else ""
        raise DataError(
            f"{folder}: no train.json or train.jsonl (or .csv, .tsv, .parquet, .txt, also as .gz or .zst) in this "
            f"folder{skipped}"
        )
    for side, paths in sides.items():
        reason = f"{dev_side}... is the dev set already" if side else "not named train... or dev..., unlike others here"
        for path in paths:
            left_out.add(path, reason)
    seen: dict[tuple[Path, str | None], Path] = {}
    for path in (*train, *dev):
        if (other := seen.setdefault((path.parent, _get_stem(path)), path)) != path:
            raise DataError(f"{other} and {path.name} seem to be the same data in two formats: remove one, or name one")
    return RecordSources(
        [FileRecords.detect(path) for path in train], [FileRecords.detect(path) for path in dev], left_out
    )


def _get_stem(path: Path) -> str | None:
    """Return the file name without its endings, or None if it is not a data file."""
    match = re.fullmatch(r"(.+?)\.(jsonl?|ndjson|csv|tsv|parquet|txt)(\.gz|\.zst)?", path.name, re.IGNORECASE)
    return match[1] if match else None


def _detect_side(parts: Iterable[str]) -> str:
    """Return train, a dev name, or "" if no part of the path starts with one."""
    for part in parts:
        word = re.split(r"[-_. ]", part.lower())[0]
        if word in _TRAIN_NAMES:
            return "train"
        if word in _DEV_NAMES:
            return word
    return ""


def _load_saved_dataset(folder: Path) -> RecordSources:
    from datasets import DatasetDict, load_from_disk

    # All files have to be inside the folder. `datasets` itself would open any path.
    about = folder / "dataset_dict.json"
    splits = read_json_if_there(about, _Splits, error=DataError)
    names = splits["splits"] if splits else []
    _check_names(names, about)
    for part in (folder, *(folder / name for name in names)):
        if state := read_json_if_there(part / "state.json", _State, error=DataError):
            files = (*state["_data_files"], *(state.get("_indices_data_files") or ()))
            _check_names([file["filename"] for file in files], part / "state.json")
    try:
        found = load_from_disk(str(folder))
    except Exception as error:  # Arrow and the library raise many classes
        raise DataError(f"{folder}: can't read this saved dataset: {first_line(error)}") from error
    return (
        _choose_splits(found, str(folder))
        if isinstance(found, DatasetDict)
        else RecordSources([RowRecords(str(folder), found)])
    )


class _Splits(TypedDict):
    """dataset_dict.json."""

    splits: list[str]


class _DataFile(TypedDict):
    filename: str


class _State(TypedDict):
    """The part of a split's state.json that names files."""

    _data_files: list[_DataFile]
    _indices_data_files: NotRequired[list[_DataFile] | None]


def _check_names(names: list[str], where: Path) -> None:
    for name in names:
        if problem := find_name_problem(name):
            raise DataError(f"{where}: {name[:200]!r} is not the name of a file or folder of this dataset: {problem}")


def _load_hub_dataset(name: str) -> RecordSources:
    """Load a dataset of the Hugging Face hub, or of its cache."""
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(name)
        # A dataset may name local files and any URL, and `datasets` would open them.
        own = f"hf://datasets/{builder.repo_id or name}@"
        for file in itertools.chain.from_iterable((builder.config.data_files or {}).values()):
            if not str(file).startswith(own):
                raise DataError(
                    f"--dataset_name_or_path {name}: its description on the hub names {str(file)[:200]!r}, which is "
                    "not one of its own files; it was refused"
                )
        builder.download_and_prepare()
        found = builder.as_dataset()
    except DataError:
        raise
    except Exception as error:  # the hub client raises anything from OSError to its own classes
        raise DataError(
            f"--dataset_name_or_path {name}: not a file or folder, and not found on the hub ({first_line(error)})"
        ) from error
    return _choose_splits(found, name)


def _choose_splits(found: Any, name: str) -> RecordSources:
    if "train" not in found:
        raise DataError(f"{name}: no train split (it has {', '.join(found)})")
    dev = next((split for split in _DEV_NAMES if split in found), None)
    train: list[RecordSource] = [RowRecords(f"{name}[train]", found["train"])]
    return RecordSources(train, [RowRecords(f"{name}[{dev}]", found[dev])] if dev else [])
