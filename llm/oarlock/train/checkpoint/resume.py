"""Finds the checkpoint that a run resumes from."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oarlock.config.load import flatten
from oarlock.config.options import list_option_specs
from oarlock.environment.console import get_logger
from oarlock.errors import CheckpointError
from oarlock.parallel.object_collectives import all_gather_objects, run_on_all_ranks
from oarlock.train.checkpoint.manifest import (
    Manifest,
    find_newest_checkpoint,
    list_checkpoints,
    make_checkpoint_path,
    read_manifest,
    verify,
)
from oarlock.train.checkpoint.pending_save import delete_folder

if TYPE_CHECKING:
    from oarlock.config.run_config import RunConfig
    from oarlock.peft.adapter_folder import Base

logger = get_logger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint to resume from."""

    folder: Path
    manifest: Manifest


def find_resume_point(config: RunConfig, data_fingerprint: str, base: Base | None = None) -> ResumePoint | None:
    """Find the checkpoint to resume from; None for a new run.

    --resume_from_checkpoint names it. Otherwise the newest valid checkpoint in output_dir is used, if it has the same
    configuration and data. --overwrite_output_dir deletes the run in output_dir.

    Without --do_train nothing is resumed: the named model is evaluated.

    Raises:
        CheckpointError: if output_dir contains a different run, listing the differences.
    """
    if not config.evaluation.do_train:
        return None
    checkpoint = config.checkpoint
    output_dir = Path(checkpoint.output_dir)
    run_on_all_ranks(lambda: _clean_up(output_dir, checkpoint.overwrite_output_dir), first_rank_only=True)
    if checkpoint.overwrite_output_dir:
        return None
    chosen: list[ResumePoint | None] = []
    run_on_all_ranks(lambda: chosen.append(_choose(config, data_fingerprint, base)), first_rank_only=True)
    point = chosen[0] if chosen else None
    choice = all_gather_objects((point.manifest.step, point.manifest.sha256) if point else None)[0]
    run_on_all_ranks(lambda: chosen.extend([] if chosen else [_open_choice(config, choice)]))
    return chosen[0]


def _open_choice(config: RunConfig, choice: tuple[int, str] | None) -> ResumePoint | None:
    """Open the checkpoint that rank 0 chose and verified, by this rank's own path: ranks never exchange paths.

    Args:
        choice: step and checksum of its manifest; None if rank 0 chose none.

    Raises:
        CheckpointError: if it is missing or differs.
    """
    if choice is None:
        return None
    step, digest = choice
    checkpoint = config.checkpoint
    folder = Path(checkpoint.resume_from_checkpoint or make_checkpoint_path(checkpoint.output_dir, int(step)))
    manifest = read_manifest(folder)
    if (manifest.step, manifest.sha256) != (step, digest):
        raise CheckpointError(f"{folder}: not the checkpoint that rank 0 resumes from; --output_dir has to be shared")
    return ResumePoint(folder, manifest)


def read_recorded_matmul_library(config: RunConfig) -> str | None:
    """The matrix multiplication library of the checkpoint that this run will probably resume from.

    It is needed before the first multiplication, long before find_resume_point() makes the choice.

    Returns:
        "" if the checkpoint does not name one; None without a checkpoint.
    """
    checkpoint = config.checkpoint
    if not config.evaluation.do_train or checkpoint.overwrite_output_dir:
        return None
    named = checkpoint.resume_from_checkpoint
    folders = [Path(named)] if named else list_checkpoints(Path(checkpoint.output_dir))
    for folder in folders:
        with contextlib.suppress(CheckpointError):
            return read_manifest(folder).products
    return None


def _choose(config: RunConfig, data_fingerprint: str, base: Base | None) -> ResumePoint | None:
    checkpoint = config.checkpoint
    output_dir = Path(checkpoint.output_dir)
    if checkpoint.resume_from_checkpoint:
        folder = Path(checkpoint.resume_from_checkpoint)
        manifest = verify(folder)
        differing = find_differences(config, manifest, data_fingerprint, base)
        if differing:
            logger.info(f"{folder} has a different configuration; resuming as requested: {'; '.join(differing)}")
        return ResumePoint(folder, manifest)
    found = find_newest_checkpoint(output_dir)
    if found is None:
        return None
    folder, manifest = found
    differing = find_differences(config, manifest, data_fingerprint, base)
    if differing:
        listing = "".join(f"\n  - {line}" for line in differing)
        raise CheckpointError(
            f"{output_dir} contains a different run ({folder.name} differs in {len(differing)} point(s)):{listing}\n"
            "Choose another --output_dir, start over with --overwrite_output_dir (deletes that run), or resume from it "
            f"anyway with --resume_from_checkpoint {folder}"
        )
    return ResumePoint(folder, manifest)


def find_differences(
    config: RunConfig, manifest: Manifest, data_fingerprint: str, base: Base | None = None
) -> list[str]:
    """List what prevents an automatic resume: changed data, base model, and options that affect the result."""
    now, specs = flatten(config), list_option_specs(type(config))
    lines = [
        f"{name} was {manifest.config.get(name)!r}, is {now[name]!r}"
        for name, spec in specs.items()
        if not spec.may_change and manifest.config.get(name, spec.default) != now[name]
    ]
    if manifest.data_fingerprint != data_fingerprint:
        lines.append("the training data changed")
    if base is not None and (manifest.base is None or manifest.base["fingerprint"] != base.fingerprint):
        lines.append(f"the weights of the base model {base.name} changed")
    return lines


def _clean_up(output_dir: Path, delete_run: bool) -> None:
    """Delete unfinished saves and half-deleted checkpoints of a killed process, or the whole run."""
    for path in (*output_dir.glob(".checkpoint-*.partial"), *output_dir.glob(".checkpoint-*.deleted")):
        shutil.rmtree(path, ignore_errors=True)
    if not delete_run:
        return
    checkpoints = list_checkpoints(output_dir)
    for path in checkpoints:
        delete_folder(path)
    for name in ("metrics.jsonl", "visualdl", "samples.jsonl", "adapter.json"):
        path = output_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if checkpoints:
        logger.info(f"--overwrite_output_dir: deleted {len(checkpoints)} checkpoint(s) of the run in {output_dir}")
