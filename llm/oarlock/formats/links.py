"""Symbolic links in untrusted folders: followed inside the folder, refused if they lead out of it.

The folder itself may be a link, since the user chose it. The cache of huggingface_hub (and AI Studio's) keeps a model's
files as snapshots/REVISION/FILE -> ../../blobs/HASH. Such links are followed inside that cache. Hard links are files.

A folder is checked before its files are read. Someone who can write into the folder could change it in between. Files
that are copied are therefore opened first and located afterwards (open_inside), which leaves no such gap.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from oarlock.errors import ModelError, OarlockError
from oarlock.formats.files import open_regular

_CACHED = re.compile(r"(models|datasets|spaces)--.+")  # a repository in a cache
_MAX_ENTRIES = 100_000  # checked in a folder, nearest to its top first, where the files that are read are
_OWN: dict[Path, tuple[Path, ...]] = {}


@dataclass(frozen=True)
class Foreign:
    """An entry of a folder that is refused.

    Attributes:
        path: its path from the folder that was given.
        reason: what it is, and where it leads.
    """

    path: Path
    reason: str

    def text(self) -> str:
        """Return a message with what to do."""
        return (
            f"{self.path} is {self.reason}, so the folder is not read. Replace it with the file itself "
            "(cp -rL copies a folder without links), or delete it"
        )


def find_own_links(folder: Path, sources: Iterable[Path]) -> None:
    """Allow links from a folder that this process made into the folders it links to."""
    _OWN[_real(folder)] = tuple(root for source in sources for root in _roots(source))


def check_links(folder: str | Path, *, error: type[OarlockError] = ModelError) -> None:
    """Refuse a folder with a dangling link or one that leads out of it, or with a pipe, a device or a socket.

    Hidden files and folders are skipped, because nothing reads them.

    Raises:
        OarlockError: of class `error`, with the file, where it leads, and what to do.
    """
    for found in find_foreign_entries(folder):
        raise error(found.text())


def find_foreign_entries(folder: str | Path, *, hidden: bool = False) -> Iterator[Foreign]:
    """Yield what check_links() refuses, ordered by depth and name.

    Args:
        hidden: check hidden files and folders too.
    """
    folder = Path(folder)
    roots, waiting, seen = _roots(folder), deque([folder]), 0
    while waiting and seen < _MAX_ENTRIES:
        current = waiting.popleft()
        try:
            with os.scandir(current) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            continue  # reading a file of it reports the reason
        for entry in entries:
            seen += 1
            path = current / entry.name
            if entry.name.startswith(".") and not hidden:
                continue
            if entry.is_symlink():
                reason = _wrong_link(path, roots)
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(path)
                reason = ""
            else:
                reason = "" if entry.is_file(follow_symlinks=False) else "a pipe, a device or a socket, not a file"
            if reason:
                yield Foreign(path, reason)


def open_inside(folder: str | Path, name: str | Path, *, error: type[OarlockError] = ModelError) -> BinaryIO:
    """Open a regular file for reading that is in a folder, or where the folder's links may lead.

    The path is taken from the open descriptor, so changing a link meanwhile has no effect.

    Raises:
        OarlockError: of class `error`.
    """
    path = Path(folder) / name
    file = open_regular(path, error=error)
    try:
        place = Path(os.readlink(f"/proc/self/fd/{file.fileno()}"))
    except OSError:  # no /proc here
        place = _real(path)
    if not _inside(place, _roots(Path(folder))):
        file.close()
        raise error(Foreign(path, f"a link that leads out of the folder, to {place}").text())
    return file


def _wrong_link(path: Path, roots: tuple[Path, ...]) -> str:
    place = _real(path)
    if not _inside(place, roots):
        return f"a link that leads out of the folder, to {place}"
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return (
            "a link that leads to itself" if error.errno == errno.ELOOP else f"a link to {place}, which does not exist"
        )
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "a link to a pipe, a device or a socket"


def _roots(folder: Path) -> tuple[Path, ...]:
    """The real folders in which the files of a folder may be."""
    real = _real(folder)
    found = [real, *_OWN.get(real, ())]
    for place in (real, *real.parents):
        repository = place.parent.parent
        if place.parent.name == "snapshots" and _CACHED.fullmatch(repository.name):
            found.append(repository / "blobs")
            break
    return tuple(found)


def _inside(place: Path, roots: tuple[Path, ...]) -> bool:
    return any(place == root or root in place.parents for root in roots)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
