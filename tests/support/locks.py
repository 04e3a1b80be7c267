"""Locks for tests."""

from __future__ import annotations

import json
import os
from pathlib import Path

from oarlock.train.output.lock import LOCK_FILE
from oarlock.train.output.lock_holder import Holder


def write_lock(folder: Path, age: float = 0.0, **changes) -> Path:
    """Write the lock of a process that is gone or on another host."""
    folder.mkdir(exist_ok=True)
    path = folder / LOCK_FILE
    path.touch()
    holder = Holder.this_process(path.stat().st_mtime - age)
    path.write_text(json.dumps(vars(holder) | {"pid": 4_000_000, "host": "elsewhere"} | changes))
    os.utime(path, times=(path.stat().st_mtime - age,) * 2)
    return path
