"""Log lines and progress bars on the console, from the first rank only."""

from __future__ import annotations

import logging
import sys
from typing import Any

from tqdm import tqdm

from oarlock.environment.ranks import is_first_rank
from oarlock.errors import printable

_ROOT = "oarlock"


class _ConsoleHandler(logging.Handler):
    """Writes "oarlock: MESSAGE" to stdout. A failure to write is raised, as with print()."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_first_rank():
            tqdm.write(printable(f"{_ROOT}: {record.getMessage()}"), file=sys.stdout)  # keeps progress bars intact
            sys.stdout.flush()


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of this package.

    The first call gives the logger "oarlock" a handler that writes to the console from rank 0 only, unless the program
    has configured that logger already.
    """
    root = logging.getLogger(_ROOT)
    if not root.handlers:
        root.addHandler(_ConsoleHandler())
        root.setLevel(logging.INFO)
        root.propagate = False
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


_logged: set[str] = set()


def log_once(message: str) -> None:
    """Log a message at level INFO, unless this process has logged the same message before."""
    if message not in _logged:
        _logged.add(message)
        get_logger(_ROOT).info(message)


def make_progress_bar(total: int, desc: str, unit: str, **options: Any) -> tqdm:
    """A progress bar on rank 0, or a line every 30 seconds without a terminal. Work of up to a second shows none."""
    pace = {"delay": 1.0} if sys.stderr.isatty() else {"delay": 20.0, "mininterval": 30.0, "maxinterval": 60.0}
    return tqdm(total=total, desc=desc, unit=unit, disable=not is_first_rank(), **pace, **options)
