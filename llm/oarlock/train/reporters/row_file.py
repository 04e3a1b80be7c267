"""JSONL files of a run: each append is complete or absent, and a resume removes later rows."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from oarlock.errors import DataError
from oarlock.files import write_text_atomically
from oarlock.formats.files import is_missing, open_regular
from oarlock.formats.json_file import parse_json
from oarlock.train.output.folder_guard import guard_write

Row = dict[str, Any]
_LONGEST_ROW = 1 << 24  # bytes
_APPENDING = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a file in output_dir: all of them or none.

    Raises:
        OutputLost: if they can't be written.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")
    with guard_write(path.parent, path.name):
        descriptor = os.open(path, _APPENDING, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            end = os.fstat(descriptor).st_size
            if end and os.pread(descriptor, 1, end - 1) != b"\n":  # remove the incomplete last line of a killed process
                start = max(0, end - _LONGEST_ROW)
                end = start + os.pread(descriptor, end - start, start).rfind(b"\n") + 1
                os.ftruncate(descriptor, end)
            left = memoryview(text)
            try:
                while left:
                    left = left[os.write(descriptor, left) :]
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)


def read_rows(path: Path) -> list[Row]:
    """Read the rows with a step; other lines, such as one cut off by a killed process, are skipped."""
    if is_missing(path):
        return []
    rows = []
    with open_regular(path, error=DataError) as file:
        for line in file:
            try:
                row = parse_json(line, path.name, dict[str, Any], error=DataError, limit=_LONGEST_ROW)
            except DataError:
                continue
            if type(row.get("step")) is int:
                rows.append(row)
    return rows


def cut_rows_after(path: Path, step: int) -> None:
    """Remove the rows after a step; all rows for step 0."""
    if is_missing(path):
        return
    kept = [json.dumps(row, ensure_ascii=False) + "\n" for row in read_rows(path) if 0 < step >= row["step"]]
    write_text_atomically(path, "".join(kept))
