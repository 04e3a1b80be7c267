"""Errors for an output_dir that is removed, emptied, replaced, made read-only or filled up during a run."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from oarlock.data.examples.worker_errors import make_worker_error
from oarlock.environment.ranks import is_first_rank
from oarlock.errors import OutputLost
from oarlock.train.checkpoint.manifest import is_complete, list_checkpoints
from oarlock.train.output.lock import current_lock, hold_output_lock

RUN_FILE = "run.json"  # written at the start of a run; missing if somebody empties the folder
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG}


def describe_newest_checkpoint(output_dir: Path, excluded: Path | None = None) -> str:
    """Name the newest complete checkpoint, in a sentence.

    Args:
        excluded: a checkpoint that could not be written.
    """
    with contextlib.suppress(OSError):
        kept = next((path for path in list_checkpoints(output_dir) if path != excluded and is_complete(path)), None)
        if kept is not None:
            return f"{kept.name} is complete; the same command resumes from it"
    return "There is no earlier checkpoint"


def check_output_dir(output_dir: Path, begun: bool = True) -> None:
    """Check that the folder still belongs to this run.

    Args:
        begun: the run has written its record.

    Raises:
        OutputLost: if it does not, saying what happened and which checkpoint is left.
    """
    lock = current_lock()
    what = None
    if lock is not None:
        what = lock.find_loss()
    elif not output_dir.is_dir():
        what = "was removed"
    if what is None and begun and is_first_rank() and not (output_dir / RUN_FILE).is_file():
        what = "was emptied"
    if what is not None:
        raise OutputLost(f"--output_dir {output_dir} {what} during the run. {describe_newest_checkpoint(output_dir)}")


@contextlib.contextmanager
def guard_write(output_dir: Path, what: str) -> Iterator[None]:
    """Guard a write into output_dir.

    Raises:
        OutputLost: if the folder no longer belongs to the run, or the write failed.
    """
    check_output_dir(output_dir)
    try:
        yield
    except OSError as error:
        check_output_dir(output_dir)
        raise OutputLost(
            f"{what} could not be written: {explain_error(error, output_dir)}. {describe_newest_checkpoint(output_dir)}"
        ) from error


@contextlib.contextmanager
def guard_run(output_dir: Path) -> Iterator[None]:
    """Hold the lock of output_dir during a run, and turn failures of its environment into one-sentence errors.

    Raises:
        EnvironmentProblem: if another run holds the folder, or it can't be written.
        OutputLost: for a file system error that concerns the folder.
        TrainingError: if a data loading process died.
    """
    with hold_output_lock(output_dir):
        try:
            yield
        except SystemError as error:
            if "DataLoader" not in str(error):
                raise
            raise make_worker_error() from error
        except OSError as error:
            path = None if error.filename is None else os.path.abspath(os.fsdecode(error.filename))
            inside = path is not None and Path(path).is_relative_to(os.path.abspath(output_dir))
            if not inside and error.errno not in _DISK_ERRORS:
                raise
            check_output_dir(output_dir, begun=False)
            raise OutputLost(
                f"{error.filename or output_dir} could not be written: {explain_error(error, output_dir)}. "
                f"{describe_newest_checkpoint(output_dir)}"
            ) from error


def explain_error(error: BaseException, folder: Path) -> str:
    """Explain why something could not be written into a folder."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "os error 28" in text:
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        return f"no space left on the disk of {folder} ({free / 1e6:,.0f} MB free)"
    if getattr(error, "errno", None) == errno.EROFS:
        return f"{folder} has become read-only"
    return getattr(error, "strerror", None) or text
