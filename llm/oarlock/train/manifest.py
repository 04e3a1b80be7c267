"""A checkpoint's manifest: what the checkpoint is, and the size and checksum of every file.

A folder without a manifest that fits is not a checkpoint. The manifest is written last, inside a folder with another
name; the rename of that folder is the moment the checkpoint begins to exist.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from oarlock.environment import say
from oarlock.errors import CheckpointError
from oarlock.files import file_sha256, settle_file, sync_file, write_json
from oarlock.formats.links import check_links
from oarlock.models.safetensors_stream import FileRecord

MANIFEST = "manifest.json"
FORMAT = 2
_NAME = re.compile(r"checkpoint-(\d+)$")


@dataclass
class Manifest:
    """What a checkpoint holds besides tensors.

    Attributes:
        step: optimizer steps done.
        samples: samples consumed, over all ranks: the data position.
        seed: the run's; random numbers of step n are seeded from (seed, n), so this and `step` are all their state.
        lr_scheduler: its state_dict.
        loss_window: sum of the step losses since the last log row, and their number.
        config: the run's options.
        data_fingerprint: of the training data.
        loss_scaler: state of fp16 loss scaling, or None.
        base: name and fingerprint of the frozen model, where only an adapter is trained and saved.
        best: the best evaluation so far (see oarlock.train.best); its "name" is its checkpoint beside this one.
        owes_evaluation: SIGTERM took the evaluation of this step; a resumed run begins with it.
        planned_steps: of the whole run when it was written; 0 where a version wrote it that did not record them.
        plan: that wrote it, in words; any other reads it.
        versions: packages that wrote it.
        products: the library that multiplied matrices (see oarlock.products); "" on a GPU, and in older checkpoints.
        files: name -> {"bytes", "sha256"}.
    """

    step: int
    samples: int
    seed: int
    lr_scheduler: dict[str, Any]
    loss_window: tuple[float, int]
    config: dict[str, Any]
    data_fingerprint: str
    loss_scaler: dict[str, Any] | None = None
    best: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    owes_evaluation: bool = False
    planned_steps: int = 0
    plan: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    products: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    def seal(self, folder: Path, known: Mapping[str, FileRecord] | None = None) -> None:
        """Record every file of the folder, have the disk hold them, and write the manifest.

        Args:
            known: files whose checksums were taken when they were written.
        """
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            if known and name in known:
                self.files[name] = {"bytes": known[name].num_bytes, "sha256": known[name].sha256}
                continue
            settle_file(path)
            self.files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        write_json(folder / MANIFEST, asdict(self))
        sync_file(folder)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: when it is missing, unreadable, or of a newer format.
    """
    check_links(folder, error=CheckpointError)
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}: not a checkpoint, or one that was never finished") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise CheckpointError(f"{path}: format {found}, this version reads {FORMAT}")
    try:
        manifest = Manifest(**content)
    except TypeError as error:
        raise CheckpointError(f"{path}: {error}") from error
    manifest.loss_window = (float(manifest.loss_window[0]), int(manifest.loss_window[1]))
    return manifest


def verify(folder: str | Path) -> Manifest:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{path} has {size:,} bytes, the manifest says {expected['bytes']:,}")
        if file_sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: checksum differs from the manifest's; the file was changed or damaged")
    return manifest


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """checkpoint-N folders, newest first."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = _NAME.match(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found, reverse=True)]


def newest_whole(output_dir: str | Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that verifies; damaged ones are named and passed over."""
    for path in list_checkpoints(output_dir):
        try:
            return path, verify(path)
        except CheckpointError as error:
            say(f"checkpoint {path.name} is not used: {error}")
    return None
