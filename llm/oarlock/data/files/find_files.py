"""Finding the data files of a folder. Links are followed, hidden files are skipped, and skipped files are reported."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from oarlock.data.files.byte_streams import Source, decompress, detect_compression, name_errors
from oarlock.data.files.json_text import parse_line
from oarlock.environment.console import log_once
from oarlock.errors import DataError
from oarlock.formats.files import open_regular

FORMATS = {
    ".txt": "txt", ".md": "txt", ".text": "txt",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_OTHER_COMPRESSIONS = (".bz2", ".xz", ".lzma", ".lz4", ".br", ".z", ".snappy")
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".tbz2", ".txz")
_HEAD_BYTES = 1 << 20  # of a .json file, read to detect its format
_MAX_NAMED = 10  # skipped files that are named; the others are counted


@dataclass
class LeftOut:
    """Files and folders that were skipped.

    Attributes:
        count: their number.
        named: "path: reason" of the first ones.
        reasons: their number per reason.
    """

    count: int = 0
    named: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, path: Path | str, reason: str, kind: str = "") -> None:
        """Add a path. `kind` is the reason without details of this file."""
        self.count += 1
        self.reasons[kind or reason] += 1
        if len(self.named) < _MAX_NAMED:
            self.named.append(f"{path}: {reason}")

    def text(self) -> str:
        """Describe the skipped files, or return "" if there are none."""
        if not self.count:
            return ""
        more = f"\n  ... and {self.count - len(self.named):,} more" if self.count > len(self.named) else ""
        return f"{self.count:,} file(s) or folder(s) not read:" + "".join(f"\n  {line}" for line in self.named) + more


def list_files(folder: Path, left_out: LeftOut) -> list[Path]:
    """List the files of a folder and its subfolders, each once, sorted by path.

    Links are followed; a link that leads out of the folder is logged. Skipped: files that a link shows a second time,
    loops, dangling links, hidden files and folders (.git, ._a.jsonl, ...), and anything but files and folders.

    Raises:
        DataError: if a folder can't be listed.
    """
    walk = _Walk(left_out)
    walk.visit(folder)
    walk.follow_links()
    outside = [link for link in walk.followed if folder.resolve() not in link.resolve().parents]
    if outside:
        more = f", ... ({len(outside):,} links)" if len(outside) > 1 else ""
        log_once(f"{outside[0]} leads out of the folder, to {outside[0].resolve()}{more}; it is read as data too")
    return sorted(walk.files)


class _Walk:
    """Walks real folders first, then links, so that a folder that is reached both ways keeps its own path."""

    def __init__(self, left_out: LeftOut) -> None:
        self.left_out = left_out
        self.files: list[Path] = []
        self.followed: list[Path] = []
        self._links: list[Path] = []
        self._seen: dict[tuple[int, int], Path] = {}

    def visit(self, folder: Path) -> None:
        """Visit a folder and all below it. Links are collected for follow_links()."""
        waiting = [folder]
        while waiting:
            current = waiting.pop()
            if not self._is_new(current, current.stat()):
                continue
            try:
                with os.scandir(current) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except OSError as error:
                raise DataError(f"{current}: this folder can't be listed: {error.strerror}") from error
            for entry in entries:
                path = current / entry.name
                if entry.name.startswith("."):
                    self.left_out.add(path, "hidden")
                elif entry.is_symlink():
                    self._links.append(path)
                elif entry.is_dir():
                    waiting.append(path)
                else:
                    self._take(path, entry.stat())

    def follow_links(self) -> None:
        """Follow the collected links, sorted by path, and those found on the way."""
        while self._links:
            self._links.sort(reverse=True)
            link = self._links.pop()
            try:
                target = link.stat()
            except OSError as error:
                loop = error.errno == errno.ELOOP
                self.left_out.add(link, "a link that leads to itself" if loop else "a dangling link")
                continue
            self.followed.append(link)
            if stat.S_ISDIR(target.st_mode):
                self.visit(link)
            else:
                self._take(link, target)

    def _take(self, path: Path, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            self.left_out.add(path, "neither a file nor a folder")
        elif self._is_new(path, found):
            self.files.append(path)

    def _is_new(self, path: Path, found: os.stat_result) -> bool:
        other = self._seen.setdefault((found.st_dev, found.st_ino), path)
        if other == path:
            return True
        kind = "a loop" if other in path.parents else "a link"
        self.left_out.add(
            path, f"{kind}: it is {other}, which is read already", f"{kind} to something that is read already"
        )
        return False


def explain_packed_file(path: Path) -> str:
    """Return why a file can't be read if its name is that of an archive or of another compression, else ""."""
    last = path.suffix.lower()
    if last in _ARCHIVES:
        return "an archive; unpack it"
    return f"compressed as {last}; gz and zst are read" if last in _OTHER_COMPRESSIONS else ""


def detect_source(path: Path) -> Source | str:
    """Detect the format of a file by its name (and its content, for .json). Returns the source, or why
    it can't be read.

    Raises:
        DataError: if it can't be opened.
    """
    packed = explain_packed_file(path)
    if packed:
        return packed
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-1] if suffixes else ""
    named = _COMPRESSIONS.get(last, "")
    if named:
        suffixes.pop()
    kind = FORMATS.get(suffixes[-1]) if suffixes else None
    if kind is None:
        ending = f"the ending {suffixes[-1]}" if suffixes else "no ending"
        return f"{ending}; supported are {', '.join(FORMATS)}, also as .gz or .zst"
    try:
        with open_regular(path, error=DataError) as file:
            compression = detect_compression(file.read(4)) or named
        source = Source(path, kind, compression, path.stat().st_size)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if kind == "parquet" and compression:
        return "a compressed parquet file; unpack it"
    return _detect_json_source(source) if kind == "json" and source.size else source


def _detect_json_source(source: Source) -> Source | str:
    """Detect what a .json file is: a list, JSON Lines (C4), or a single object, which is not data."""
    with name_errors(source), open_regular(source.path, error=DataError) as raw:
        head = decompress(raw, source.compression).read(_HEAD_BYTES)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        return source
    line, end, _ = text.partition(b"\n")
    try:
        if end or len(head) < _HEAD_BYTES:
            parse_line(line.decode("utf-8", "replace"))
    except ValueError:
        if text.startswith(b"{"):
            return "one JSON object over several lines; lists and JSON Lines are read"
    return Source(source.path, "jsonl", source.compression, source.size)


def find_sources(paths: tuple[str, ...] | list[str], left_out: LeftOut) -> list[Source]:
    """Find the sources among files and folders, each once, in a stable order.

    Raises:
        DataError: for a missing path, an unsupported file, or a folder without supported files.
    """
    sources: dict[tuple[int, int], Source] = {}
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if path.is_dir():
            found = list(_find_in_folder(path, left_out))
        elif isinstance(named := detect_source(path), Source):
            found = [named]
        else:
            raise DataError(f"{path}: unsupported file: {named}")
        for source in found:
            place = source.path.stat()
            other = sources.setdefault((place.st_dev, place.st_ino), source)
            if other is not source:
                left_out.add(source.path, f"listed before, as {other.path}", "listed before")
    return list(sources.values())


def _find_in_folder(folder: Path, left_out: LeftOut) -> Iterator[Source]:
    any_read = False
    for path in list_files(folder, left_out):
        source = detect_source(path)
        if isinstance(source, str):
            left_out.add(path, source)
        else:
            any_read = True
            yield source
    if not any_read:
        skipped = f"\n{left_out.text()}" if left_out.count else ""
        raise DataError(f"{folder}: no {', '.join(FORMATS)} files (or .gz, .zst of them) in this folder{skipped}")
