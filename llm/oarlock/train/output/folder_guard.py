"""Errors for what may happen to output_dir during a run: it is removed, emptied, replaced, read-only or full."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from oarlock.data.examples.worker_errors import reader_died
from oarlock.environment.ranks import is_first_rank
from oarlock.errors import OutputLost
from oarlock.train.checkpoint.manifest import list_checkpoints, looks_whole
from oarlock.train.output.lock import held_lock, output_held

RUN_FILE = "run.json"  # written when a run begins; it goes when somebody empties the folder
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG}


def last_good_state(output_dir: Path, but: Path | None = None) -> str:
    """The newest checkpoint that is there, as a sentence.

    Args:
        but: one that does not count, since it could not be written.
    """
    with contextlib.suppress(OSError):
        kept = next((path for path in list_checkpoints(output_dir) if path != but and looks_whole(path)), None)
        if kept is not None:
            return f"{kept.name} is whole; the same command goes on from it"
    return "There is no earlier checkpoint"


def check_output(output_dir: Path, begun: bool = True) -> None:
    """Refuse to go on where the folder is no longer the one that this run took.

    Args:
        begun: the run has written its record.

    Raises:
        OutputLost: saying what happened and what is left.
    """
    lock = held_lock()
    what = None
    if lock is not None:
        what = lock.lost()
    elif not output_dir.is_dir():
        what = "was removed"
    if what is None and begun and is_first_rank() and not (output_dir / RUN_FILE).is_file():
        what = "was emptied"
    if what is not None:
        raise OutputLost(f"--output_dir {output_dir} {what} while the run was going on. {last_good_state(output_dir)}")


@contextlib.contextmanager
def writing(output_dir: Path, what: str) -> Iterator[None]:
    """Around a write of a running run.

    Raises:
        OutputLost: before it, where the folder is not the run's any more; after it, where it failed.
    """
    check_output(output_dir)
    try:
        yield
    except OSError as error:
        check_output(output_dir)
        raise OutputLost(
            f"{what} could not be written: {reason(error, output_dir)}. {last_good_state(output_dir)}"
        ) from error


@contextlib.contextmanager
def run_in(output_dir: Path) -> Iterator[None]:
    """A whole run: the folder is its own in here, and what ends it from outside becomes one sentence.

    Raises:
        EnvironmentProblem: when another run has the folder, or it can't be written.
        OutputLost: for an error of the file system that concerns the folder.
        TrainingError: when a process that reads data died.
    """
    with output_held(output_dir):
        try:
            yield
        except SystemError as error:
            if "DataLoader" not in str(error):
                raise
            raise reader_died() from error
        except OSError as error:
            inside = error.filename is not None and _is_inside(os.fsdecode(error.filename), output_dir)
            if not inside and error.errno not in _OF_THE_DISK:
                raise
            check_output(output_dir, begun=False)
            raise OutputLost(
                f"{error.filename or output_dir} could not be written: {reason(error, output_dir)}. "
                f"{last_good_state(output_dir)}"
            ) from error


def _is_inside(path: str, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def reason(error: BaseException, folder: Path) -> str:
    """Why something could not be written, in words."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "os error 28" in text:
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        return f"no space left on the disk of {folder} ({free / 1e6:,.0f} MB free)"
    if getattr(error, "errno", None) == errno.EROFS:
        return f"{folder} is read-only now"
    return getattr(error, "strerror", None) or text
