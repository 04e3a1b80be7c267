"""Pretraining text: the Python standard library that runs this program (more than 10 MB of real text and code)."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from oarlock.data.files.byte_streams import Source
from oarlock.errors import DataError

# Test suites are left out (not every distribution ships them, and their text is mostly fixtures), and so is what
# people installed.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
MINIMUM_BYTES = 10_000_000


def stdlib_sources() -> list[Source]:
    """Every UTF-8 .py file of the standard library, in a stable order; one file is one document.

    Raises:
        DataError: when less than 10 MB of it is there (a stripped-down Python).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [
        Source(path, "txt", "", path.stat().st_size)
        for path in sorted(root.rglob("*.py"))
        if not _LEFT_OUT.intersection(path.relative_to(root).parts) and _is_utf8(path)
    ]
    total = sum(source.size for source in sources)
    if total < MINIMUM_BYTES:
        raise DataError(
            f"{root}: only {total / 1e6:.1f} MB of Python source (10 MB expected): this Python was installed without "
            "its full library. Install the full package (on Debian: python3-full), or give --input_dir."
        )
    return sources


def stdlib_texts(every: int = 1) -> Iterator[str]:
    """The documents themselves; with `every` n, each n-th one."""
    for source in stdlib_sources()[::every]:
        yield source.path.read_text(encoding="utf-8")


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return False
    return True
