"""Errors written for users: what is wrong, where, and what to do."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

# Exit codes, the same everywhere: a wrong flag or file is 2 (as argparse and sysexits do), a run that fails is 1.
EXIT_FAILED = 1
EXIT_USAGE = 2


# Control characters except tab and newline, characters that change the text direction, lone surrogates.
_NOT_PRINTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# Called with the message of an error that ends this program, so that other ranks learn of it.
failure_listeners: list[Callable[[str], None]] = []


class OarlockError(Exception):
    """A failure whose message is complete without a stack trace."""

    exit_code = EXIT_FAILED


class ConfigError(OarlockError):
    """The configuration (YAML, flags) is wrong; raised before Paddle is imported."""

    exit_code = EXIT_USAGE


class DataError(OarlockError):
    """An input file or record is missing, unreadable or malformed. The message names file:line if there is one."""


class ModelError(OarlockError):
    """A model or tokenizer can't be found, loaded, or does not fit the data."""


class RequestRefused(OarlockError):
    """A request to a model that can't be answered as it is asked."""


class CheckpointError(OarlockError):
    """A checkpoint can't be written, read or trusted."""


class TrainingError(OarlockError):
    """Training can't continue (NaN loss, for example)."""


class OutputLost(TrainingError):
    """The output folder of a run was deleted or replaced, or its disk is full."""


class EnvironmentProblem(OarlockError):
    """The machine lacks something: a device, a package, disk space."""


class StoppedWithOthers(OarlockError):
    """Another rank failed and has reported why. This rank stops without a message."""


def printable(text: str) -> str:
    """Escape control characters in a message, because names and values in it may come from untrusted files."""
    return _NOT_PRINTED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def report(error: OarlockError) -> None:
    """Print an error on stderr, with the rank if there is more than one process."""
    if isinstance(error, StoppedWithOthers):
        return
    rank = os.environ.get("PADDLE_TRAINER_ID")
    where = f" (rank {rank})" if rank and os.environ.get("PADDLE_TRAINERS_NUM", "1") != "1" else ""
    print(f"\noarlock: error{where}: {printable(str(error))}", file=sys.stderr, flush=True)


def notify_failure_listeners(error: OarlockError) -> None:
    """Tell the other ranks that this one has failed, unless one of them failed first."""
    if not isinstance(error, StoppedWithOthers):
        for listener in failure_listeners:
            listener(str(error))


def exit_with(main: Callable[[], int | None]) -> None:
    """Run a program's main function and exit. An OarlockError is printed as a message and sets the exit code."""
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
