"""Pretraining text: the standard library of the running Python, more than 10 MB of text and code."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from oarlock.data.files.byte_streams import Source
from oarlock.errors import DataError

# Test suites are excluded, because they are mostly fixtures and some distributions don't ship them. Installed packages
# are excluded too.
_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
MIN_BYTES = 10_000_000


def find_stdlib_sources() -> list[Source]:
    """Find the UTF-8 .py files of the standard library, in a stable order. Each file is one document.

    Raises:
        DataError: if there are less than 10 MB (a stripped-down Python).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for path in sorted(root.rglob("*.py")):
        if _EXCLUDED.intersection(path.relative_to(root).parts):
            continue
        try:
            path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        sources.append(Source(path, "txt", "", path.stat().st_size))
    total = sum(source.size for source in sources)
    if total < MIN_BYTES:
        raise DataError(
            f"{root}: only {total / 1e6:.1f} MB of Python source (10 MB expected): this Python was installed without "
            "its full library. Install the full package (on Debian: python3-full), or set --input_dir."
        )
    return sources


def read_stdlib_texts(every: int = 1) -> Iterator[str]:
    """Read the documents, or only each `every`-th one."""
    for source in find_stdlib_sources()[::every]:
        yield source.path.read_text(encoding="utf-8")
