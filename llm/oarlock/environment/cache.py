"""The cache folder of this user."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder for data that is kept between runs: $XDG_CACHE_HOME/oarlock, by default ~/.cache/oarlock."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "oarlock"
