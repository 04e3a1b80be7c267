"""The code of this package inside a Triton repository: whether it is this version's, byte for byte."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY = "lib/oarlock"  # in a version of a Triton model
TEMPLATES = Path(__file__).resolve().parent / "models"  # the models themselves


def foreign_code(repository: Path) -> list[str]:
    """Code of a repository (its models and their libraries) that this version does not have so: places in it, sorted.

    A repository is run as it stands, and a manifest beside the code proves nothing about it.
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
