"""A checkpoint's manifest: the state of the run, and the size and checksum of every file.

A folder without a valid manifest is not a checkpoint. The manifest is written last, into a folder with a temporary
name; renaming that folder creates the checkpoint. The manifest carries its own checksum, so every byte is covered.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from oarlock.config.finetune import FinetuneConfig
from oarlock.config.options import OptionSpec, list_option_specs
from oarlock.config.pretrain import PretrainConfig
from oarlock.environment.console import get_logger
from oarlock.environment.cpu import count_available_cores
from oarlock.errors import CheckpointError
from oarlock.files import compute_sha256, settle_file, sync_file, write_text_atomically
from oarlock.formats.files import is_missing, read_bytes
from oarlock.formats.json_file import INDEX_BYTES, parse_json, read_json
from oarlock.formats.links import check_links
from oarlock.formats.sealed import SEAL, check_seal, is_sealed, seal_text
from oarlock.train.checkpoint.manifest_fields import (
    BaseState,
    BestState,
    Count,
    FileEntry,
    ScalerState,
    SchedulerState,
    TrainerStateFile,
)
from oarlock.weights.safetensors_file import FileRecord
from oarlock.weights.shard_index import INDEX
from oarlock.weights.sharded_store import ShardedStore

logger = get_logger(__name__)

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
FORMAT = 3
_NAME = re.compile(r"checkpoint-([0-9]+)")
_HEX = re.compile(r"[0-9a-f]{64}")
_NEEDED = (INDEX, TRAINER_STATE)  # no run can resume without them
_HASHED_AT_ONCE = 8
_LARGEST_BATCH = 1 << 24  # samples of an optimizer step, over all ranks


@dataclass
class Manifest:
    """The state of a run besides its tensors, and the files of its checkpoint.

    Attributes:
        step: optimizer steps done.
        samples: samples consumed over all ranks, which is the data position.
        seed: the run's seed. Random numbers of step n are seeded from (seed, n), so no generator state is kept.
        lr_scheduler: its state_dict.
        loss_window: sum of the step losses since the last log row (None: not finite), and their number.
        config: the run's options.
        data_fingerprint: fingerprint of the training data.
        loss_scaler: state of fp16 loss scaling, or None.
        base: name and fingerprint of the frozen model, if only an adapter is trained and saved.
        best: the best evaluation so far; its "name" is the name of its checkpoint.
        owes_evaluation: SIGTERM interrupted the evaluation of this step; a resumed run starts with it.
        planned_steps: length of the run when the checkpoint was written.
        plan: description of the parallel plan that wrote it; any plan can read it.
        versions: versions of the packages that wrote it.
        products: the matrix multiplication library (see oarlock.environment.matmul_library); "" on a GPU.
        files: name -> {"bytes", "sha256"} of every file except the manifest.
        sha256: checksum of the manifest up to this field, which is the last one.
    """

    step: Count
    samples: Count
    seed: int
    lr_scheduler: SchedulerState
    loss_window: tuple[float | None, Count]
    config: dict[str, str | int | float | bool | None]
    data_fingerprint: str
    loss_scaler: ScalerState | None = None
    best: BestState | None = None
    base: BaseState | None = None
    owes_evaluation: bool = False
    planned_steps: Count = 0
    plan: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    products: str = ""
    files: dict[str, FileEntry] = field(default_factory=dict)
    format: int = FORMAT
    sha256: str = ""

    def seal(self, folder: Path, known: Mapping[str, FileRecord] | None = None) -> None:
        """Record every file of the folder, sync them to disk, and write the manifest.

        Args:
            known: files whose checksums were computed while they were written.

        Raises:
            CheckpointError: if one of those is missing.
        """
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            if known and name in known:
                self.files[name] = {"bytes": known[name].num_bytes, "sha256": known[name].sha256}
                continue
            settle_file(path)
            self.files[name] = {"bytes": path.stat().st_size, "sha256": compute_sha256(path)}
        if lost := sorted(set(known or ()) - set(self.files)):
            raise CheckpointError(f"{folder / lost[0]} is missing")
        content = asdict(self)
        del content[SEAL]
        loss, steps = self.loss_window
        content["loss_window"] = [loss if loss is not None and math.isfinite(loss) else None, steps]
        write_text_atomically(folder / MANIFEST, seal_text(content))
        sync_file(folder)


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a checkpoint folder.

    Raises:
        CheckpointError: if it is missing, was changed after it was written, or has another format.
    """
    check_links(folder, error=CheckpointError)
    path = Path(folder) / MANIFEST
    if is_missing(path):
        raise CheckpointError(f"{folder}: no {MANIFEST}: not a checkpoint, or an unfinished one")
    content = read_bytes(path, limit=INDEX_BYTES, what="manifest", error=CheckpointError)
    if not is_sealed(content):
        found = parse_json(content, str(path), error=CheckpointError, limit=INDEX_BYTES)
        if isinstance(found, dict) and found.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: format {found.get('format')}; this version reads format {FORMAT}, whose manifests have their "
                "own checksum"
            )
    check_seal(content, str(path), CheckpointError)
    manifest = parse_json(content, str(path), Manifest, error=CheckpointError, limit=INDEX_BYTES, extra="forbid")
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path}: format {manifest.format}; this version reads format {FORMAT}")
    if manifest.samples > manifest.step * _LARGEST_BATCH:
        raise CheckpointError(f"{path}: {manifest.step:,} steps can't consume {manifest.samples:,} samples")
    _check_names(manifest, path)
    # Options that this version does not know are kept unchanged.
    specs: dict[str, OptionSpec] = {**list_option_specs(PretrainConfig), **list_option_specs(FinetuneConfig)}
    for name, value in manifest.config.items():
        if (spec := specs.get(name)) is None:
            continue
        try:
            manifest.config[name] = spec.convert(value)
        except ValueError as error:
            raise CheckpointError(f"{path}: config.{name} {error}") from error
        if (problem := spec.problem(manifest.config[name])) is not None:
            raise CheckpointError(f"{path}: config.{name} {problem}; got {value!r}")
    return manifest


def _check_names(manifest: Manifest, path: Path) -> None:
    """Refuse names outside the folder, and a list without the files that a run needs."""
    for name, entry in manifest.files.items():
        parts = PurePosixPath(name).parts
        plain = name == "/".join(parts) and "\\" not in name and not {"..", "/"} & set(parts)
        if not plain or name == MANIFEST or not _HEX.fullmatch(entry["sha256"]):
            raise CheckpointError(f"{path}: {name!r} is not a valid file name with a checksum")
    if missing := [name for name in _NEEDED if name not in manifest.files]:
        raise CheckpointError(f"{path}: {' and '.join(missing)} missing from its list of files")
    best = manifest.best["name"] if manifest.best else None
    if best is not None and not _NAME.fullmatch(best):
        raise CheckpointError(f"{path}: {best!r} is not a valid name of the best checkpoint")


def verify(folder: str | Path) -> Manifest:
    """Verify a checkpoint: its manifest, the checksum of every file, and that the files are consistent.

    Files that the manifest does not list are ignored here and everywhere (see list_unlisted_files()).

    Raises:
        CheckpointError: naming the first file that is missing, was changed or is not a regular file.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if (match := _NAME.fullmatch(folder.name)) and int(match.group(1)) != manifest.step:
        raise CheckpointError(f"{folder}: its manifest belongs to step {manifest.step:,}")
    for name, expected in manifest.files.items():
        _check_file(folder, name, expected["bytes"])
    with ThreadPoolExecutor(min(_HASHED_AT_ONCE, count_available_cores())) as pool:
        digests = pool.map(compute_sha256, [folder / name for name in manifest.files])
        try:
            for (name, expected), digest in zip(manifest.files.items(), digests, strict=True):
                if digest != expected["sha256"]:
                    raise CheckpointError(
                        f"{folder / name}: checksum differs from the manifest's; the file was changed or damaged"
                    )
        except OSError as error:
            raise CheckpointError(f"{folder}: can't be read: {error}") from error
        finally:
            pool.shutdown(cancel_futures=True)
    state = read_json(folder / TRAINER_STATE, TrainerStateFile, error=CheckpointError, extra="forbid")
    if state.global_step != manifest.step:
        raise CheckpointError(
            f"{folder / TRAINER_STATE}: step {state.global_step:,}, but the manifest says {manifest.step:,}"
        )
    with ShardedStore.open(folder) as pieces:
        pieces.check(manifest.files)
    return manifest


def _check_file(folder: Path, name: str, size: int) -> None:
    """Refuse anything but a regular file of that size, and links on the way to it."""
    path, found = folder, os.stat_result([0] * 10)
    for part in PurePosixPath(name).parts:
        path = path / part
        try:
            found = os.lstat(path)
        except (OSError, ValueError):
            raise CheckpointError(f"{folder / name} is missing") from None
        if stat.S_ISLNK(found.st_mode):
            raise CheckpointError(f"{path} is a link; a checkpoint contains only regular files")
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    if found.st_size != size:
        raise CheckpointError(f"{path} has {found.st_size:,} bytes, but the manifest says {size:,}")


def read_complete_manifest(folder: Path) -> Manifest:
    """Read the manifest, and check that all files exist with the right size. Checksums are left to verify().

    Raises:
        CheckpointError: naming the first file that is missing, has another size or is not a regular file.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        _check_file(folder, name, expected["bytes"])
    return manifest


def is_complete(folder: Path) -> bool:
    """Tell whether read_complete_manifest() accepts a folder."""
    try:
        read_complete_manifest(folder)
    except CheckpointError:
        return False
    return True


def list_unlisted_files(folder: str | Path, manifest: Manifest) -> list[str]:
    """Names in a checkpoint folder that its manifest does not list; they were added later, and nothing reads them."""
    folder = Path(folder)
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        found += [(Path(place) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(set(found) - {MANIFEST, *manifest.files})


def make_checkpoint_path(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir) / f"checkpoint-{step}"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint-N folders, newest first."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found, reverse=True)]


def find_newest_checkpoint(output_dir: str | Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that passes verify(); damaged ones are reported and skipped."""
    for path in list_checkpoints(output_dir):
        try:
            manifest = verify(path)
        except CheckpointError as error:
            logger.info(f"checkpoint {path.name} is skipped: {error}")
            continue
        if more := list_unlisted_files(path, manifest):
            logger.info(
                f"{path.name} contains files that its manifest does not list; they are ignored: {', '.join(more[:4])}"
            )
        return path, manifest
    return None
