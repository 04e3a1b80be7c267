"""Links in folders that come from outside: followed inside the folder, refused by name where they lead out of it.

The folder itself may be a link, since its user chose it. A cache of huggingface_hub (AI Studio's is made like it) keeps
a model's files as snapshots/REVISION/FILE -> ../../blobs/HASH: such a link is followed inside of that cache. Hard links
are files.

The check of a folder comes before its files are read. Who can write into the folder can change it in between: what is
copied is therefore opened first and asked for its own place afterwards (open_inside), which leaves no such gap.
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
_MOST_ENTRIES = 100_000  # of a folder that are looked at, those nearest to its top first; what is read lies there
_OWN: dict[Path, tuple[Path, ...]] = {}


@dataclass(frozen=True)
class Foreign:
    """What is found in a folder and does not belong there.

    Attributes:
        path: as it is reached from the folder that was given.
        reason: what it is, and where it leads.
    """

    path: Path
    reason: str

    def text(self) -> str:
        """A sentence with what to do."""
        return (
            f"{self.path} is {self.reason}, so nothing of the folder is read. Replace it by the file itself "
            "(cp -rL makes a copy of a folder without links), or delete it"
        )


def own_links(folder: Path, sources: Iterable[Path]) -> None:
    """Let a folder that this process made of links lead into the folders it was made of."""
    _OWN[_real(folder)] = tuple(root for source in sources for root in _roots(source))


def check_links(folder: str | Path, *, error: type[OarlockError] = ModelError) -> None:
    """Refuse a folder with a link that leads out of it or nowhere, or with a pipe, a device or a socket.

    Hidden files and folders are not looked at: nothing reads them.

    Raises:
        OarlockError: of the class given, naming the file, where it leads, and what to do.
    """
    for found in foreign_entries(folder):
        raise error(found.text())


def foreign_entries(folder: str | Path, *, hidden: bool = False) -> Iterator[Foreign]:
    """What check_links() refuses, in order of depth and name.

    Args:
        hidden: look at hidden files and folders too.
    """
    folder = Path(folder)
    roots, waiting, seen = _roots(folder), deque([folder]), 0
    while waiting and seen < _MOST_ENTRIES:
        current = waiting.popleft()
        try:
            with os.scandir(current) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            continue  # whoever wants a file of it says why it can't be read
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
    """Open a file of a folder for reading: a regular file that lies there, or where the folder's links may lead.

    What was opened is asked for its place, so that a link that is changed meanwhile leads nowhere else.

    Raises:
        OarlockError: of the class given.
    """
    path = Path(folder) / name
    file = open_regular(path, error=error)
    place = _place_of(file.fileno(), path)
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
        return "a link that leads to itself" if error.errno == errno.ELOOP else f"a link to {place}, which is not there"
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "a link to a pipe, a device or a socket"


def _place_of(descriptor: int, path: Path) -> Path:
    try:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    except OSError:  # no /proc here
        return _real(path)


def _roots(folder: Path) -> tuple[Path, ...]:
    """Real folders that the files of a folder may lie in."""
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
