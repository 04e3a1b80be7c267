"""Errors that are meant for the person at the keyboard: what is wrong, where, and what to do."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

# Exit codes, the same everywhere: a wrong flag or file is 2 (as argparse and sysexits do), a run that fails is 1.
EXIT_FAILED = 1
EXIT_USAGE = 2


# Control characters but tab and line end, what turns the direction of writing, halves of characters.
_NOT_PRINTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# Called with the message of an error that ends this program (so that other ranks learn of it).
failure_listeners: list[Callable[[str], None]] = []


class OarlockError(Exception):
    """A failure with a message complete enough that no stack trace is needed."""

    exit_code = EXIT_FAILED


class ConfigError(OarlockError):
    """The configuration (YAML, flags) is wrong; raised before Paddle is imported."""

    exit_code = EXIT_USAGE


class DataError(OarlockError):
    """An input file or record is missing, unreadable or malformed; names file:line where there is one."""


class ModelError(OarlockError):
    """A model or tokenizer can't be found, loaded, or does not fit the data."""


class RequestRefused(OarlockError):
    """A request to a model that can't be answered as it is asked."""


class CheckpointError(OarlockError):
    """A checkpoint can't be written, read or trusted."""


class TrainingError(OarlockError):
    """Training can't go on (NaN loss, for example)."""


class OutputLost(TrainingError):
    """The folder that a run writes into is gone, full or another one."""


class EnvironmentProblem(OarlockError):
    """The machine lacks something: a device, a package, disk space."""


class StoppedWithOthers(OarlockError):
    """Another rank failed and has told why; this one stops without a word."""


def printable(text: str) -> str:
    """A message with nothing in it that a terminal obeys, or can't be written: names and values come from files."""
    return _NOT_PRINTED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def first_line(error: BaseException) -> str:
    """What an error says first; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def report(error: OarlockError) -> None:
    """Print an error once, on stderr, with the rank when there is more than one process."""
    if isinstance(error, StoppedWithOthers):
        return
    rank = os.environ.get("PADDLE_TRAINER_ID")
    where = f" (rank {rank})" if rank and os.environ.get("PADDLE_TRAINERS_NUM", "1") != "1" else ""
    print(f"\noarlock: error{where}: {printable(str(error))}", file=sys.stderr, flush=True)


def notify_failure_listeners(error: OarlockError) -> None:
    """Let the other ranks know that this one has failed, unless one of them failed first."""
    if not isinstance(error, StoppedWithOthers):
        for listener in failure_listeners:
            listener(str(error))


def exit_with(main: Callable[[], int | None]) -> None:
    """Run a program's main function; an OarlockError becomes a message and its exit code, never a stack trace."""
    try:
        code = main() or 0
    except OarlockError as error:
        report(error)
        notify_failure_listeners(error)
        code = error.exit_code
    except BrokenPipeError:  # `oarlock data show | head`
        code = 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.stdout.flush()
    sys.exit(code)
