"""Checks that the code in a Triton repository is this version's, byte for byte."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY = "lib/oarlock"  # in the folder of a Triton model's version
TEMPLATES = Path(__file__).resolve().parent / "models"  # the models themselves


def find_foreign_code(repository: Path) -> list[str]:
    """Find code of a repository (models and their libraries) that differs from this version's. Returns sorted paths.

    A repository's code is run as it is, and a manifest next to it proves nothing.
    """
    templates = sorted(TEMPLATES.glob("*/model.py"))
    models = [path for path in repository.glob("*/*/model.py") if not any(_is_same(path, own) for own in templates)]
    libraries = [
        path
        for library in repository.glob(f"*/*/{LIBRARY}")
        for path in library.rglob("*")
        if not path.is_dir() and not _is_same(path, PACKAGE / path.relative_to(library))
    ]
    return sorted(path.relative_to(repository).as_posix() for path in (*models, *libraries))


def _is_same(path: Path, own: Path) -> bool:
    try:
        if path.is_symlink() or not own.is_file() or os.stat(path).st_size != os.stat(own).st_size:
            return False
        return path.read_bytes() == own.read_bytes()
    except OSError:
        return False
