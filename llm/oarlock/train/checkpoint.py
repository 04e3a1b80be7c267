"""Write, read, rotate and choose checkpoints.

The tensors are PaddleNLP's unified checkpoint (safetensors under structured names, readable under another plan); what
it keeps in pickles beside them (trainer state, scheduler, random numbers, arguments) is in our manifest, so that no
pickle is ever read.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paddlenlp.utils.log import logger as paddlenlp_logger

from oarlock.config.load import flatten
from oarlock.config.options import option_specs
from oarlock.environment import say
from oarlock.errors import CheckpointError, StoppedWithOthers
from oarlock.files import sync_file
from oarlock.parallel.sync import together
from oarlock.train.manifest import Manifest, list_checkpoints, newest_whole, verify

if TYPE_CHECKING:
    from oarlock.config.schema import Config
    from oarlock.train.trainer import OarlockTrainer


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint to go on from."""

    folder: Path
    manifest: Manifest


def find_resume_point(config: Config, data_fingerprint: str) -> ResumePoint | None:
    """Where this run goes on, None for a new one.

    --resume_from_checkpoint names it; otherwise the newest whole checkpoint in output_dir is used if it is of the
    same configuration and data. --overwrite_output_dir deletes what is there.

    Without --do_train nothing is resumed: the model that was named is evaluated.

    Raises:
        CheckpointError: naming what differs, when output_dir holds another run.
    """
    if not config.evaluation.do_train:
        return None
    checkpoint = config.checkpoint
    output_dir = Path(checkpoint.output_dir)
    together(lambda: _remove_leftovers(output_dir), first_rank_only=True)
    if checkpoint.overwrite_output_dir:
        together(lambda: _clear_run(output_dir), first_rank_only=True)
        return None
    if checkpoint.resume_from_checkpoint:
        folder = Path(checkpoint.resume_from_checkpoint)
        manifest = verify(folder)
        differing = differences(config, manifest, data_fingerprint)
        if differing:
            say(f"{folder} is of another configuration, as you asked: {'; '.join(differing)}")
        return ResumePoint(folder, manifest)
    found = newest_whole(output_dir)
    if found is None:
        return None
    folder, manifest = found
    differing = differences(config, manifest, data_fingerprint)
    if differing:
        listing = "".join(f"\n  - {line}" for line in differing)
        raise CheckpointError(
            f"{output_dir} holds another run (its {folder.name} differs in {len(differing)} point(s)):{listing}\n"
            "Choose another --output_dir, start anew with --overwrite_output_dir (deletes that run), or go on from it "
            f"all the same with --resume_from_checkpoint {folder}"
        )
    return ResumePoint(folder, manifest)


def differences(config: Config, manifest: Manifest, data_fingerprint: str) -> list[str]:
    """What stops a silent resume: options that change what is learnt, and the data."""
    now, specs = flatten(config), option_specs(type(config))
    lines = [
        f"{name} was {manifest.config.get(name)!r}, is {now[name]!r}"
        for name, spec in specs.items()
        if not spec.may_change and manifest.config.get(name, spec.default) != now[name]
    ]
    if manifest.data_fingerprint != data_fingerprint:
        lines.append("the training data changed")
    return lines


def _remove_leftovers(output_dir: Path) -> None:
    """Unfinished saves and half-deleted checkpoints of a killed process."""
    for path in (*output_dir.glob(".checkpoint-*.partial"), *output_dir.glob(".checkpoint-*.deleted")):
        shutil.rmtree(path, ignore_errors=True)


def _clear_run(output_dir: Path) -> None:
    checkpoints = list_checkpoints(output_dir)
    for path in checkpoints:
        _delete(path)
    for name in ("metrics.jsonl", "visualdl", "samples.jsonl"):
        path = output_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if checkpoints:
        say(f"--overwrite_output_dir: deleted {len(checkpoints)} checkpoint(s) of the run in {output_dir}")


def save(trainer: OarlockTrainer, manifest: Manifest) -> Path:
    """Write output_dir/checkpoint-<step>: aside first, then renamed.

    Raises:
        CheckpointError: when it can't be written; what was written of it is removed, earlier ones are untouched.
    """
    output_dir = Path(trainer.args.output_dir)
    final = output_dir / f"checkpoint-{manifest.step}"
    partial = output_dir / f".checkpoint-{manifest.step}.partial"

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write() -> None:
        handler = trainer.unified_checkpoint_handler
        with _quiet():
            handler.save_unified_checkpoint(trainer.model, trainer.optimizer, str(partial))
            handler.save_unified_optimizer(trainer.model, trainer.optimizer, str(partial), str(partial))

    def commit() -> None:
        trainer.save_tokenizer_and_template(partial)
        manifest.seal(partial)
        if final.exists():
            _delete(final)
        partial.rename(final)
        sync_file(output_dir)

    try:
        together(prepare, first_rank_only=True)
        together(write)
        together(commit, first_rank_only=True)
    except StoppedWithOthers:
        raise
    except Exception as error:  # safetensors has its own error class for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        kept = next(iter(list_checkpoints(output_dir)), None)
        raise CheckpointError(
            f"checkpoint {final.name} could not be written: {_reason(error, output_dir)}. "
            + (f"{kept.name} is whole; the same command goes on from it" if kept else "There is no earlier checkpoint")
        ) from error
    return final


def _reason(error: Exception, folder: Path) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "os error 28" in text:
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        return f"no space left on the disk of {folder} ({free / 1e6:,.0f} MB free)"
    return text


def load(trainer: OarlockTrainer, point: ResumePoint) -> dict[str, Any]:
    """Put a checkpoint's weights into the model; returns the optimizer's state, for after it is wrapped."""
    with _quiet():
        trainer.unified_checkpoint_handler.load_unified_checkpoint(trainer.model, str(point.folder))
        return trainer.unified_checkpoint_handler.load_unified_optimizer(
            model=trainer.model, optimizer=trainer.optimizer, resume_from_checkpoint=str(point.folder)
        )


def rotate(output_dir: Path, keep: int | None, best: str | None = None) -> None:
    """Delete the oldest checkpoints beyond `keep`; never the best one."""
    if keep is None:
        return
    others = [path for path in list_checkpoints(output_dir) if path.name != best]
    for path in others[max(1, keep - (best is not None)) :]:
        _delete(path)


def _delete(path: Path) -> None:
    """Out of sight in one step first: a half-deleted folder must not look like a damaged checkpoint."""
    hidden = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PaddleNLP warns at every save on one card that it can't be asynchronous."""
    level = paddlenlp_logger.logger.level
    paddlenlp_logger.set_level("ERROR")
    try:
        yield
    finally:
        paddlenlp_logger.logger.setLevel(level)
