"""Files written so that they are either whole or not there, and their checksums."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from oarlock.errors import ModelError, OarlockError
from oarlock.formats.json_file import TOKENIZER_BYTES, read_json, read_json_if_there

ADAPTER_FILE = "adapter.json"  # makes a folder an adapter folder (see oarlock.peft.adapter_folder)
PEFT_FILE, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT saves an adapter
_BLOCK = 1 << 22
_umask = os.umask(0)  # asking for it sets it, for all threads: once, while there is one
os.umask(_umask)
ANYONE = 0o666  # the most permissions of a file, of which the umask takes some away


def keep_private() -> None:
    """From now on what this process and its children write is readable by their user alone."""
    global _umask
    _umask = 0o077
    os.umask(_umask)


def umask() -> int:
    """The permissions that this process takes from the files it makes."""
    return _umask


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """One process at a time (flock on a file that stays there, empty); the kernel frees it when a process dies."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, in hex (what `sha256sum` prints)."""
    with open(path, "rb") as file:
        return stream_sha256(file)


def stream_sha256(file: BinaryIO) -> str:
    """The same of a file that is open, from where it stands."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Note:
    """What is kept of a file: its size, times and inode, and the checksum it had then."""

    seen: list[int]
    sha256: str


def file_sha256_noted(path: str | Path, notes: str | Path) -> str:
    """file_sha256, taken again only when the file changed (by its size, times and inode); `notes` is a folder.

    A file changed within the last two seconds is not noted: the next change might not show in its times.
    """
    path = Path(path).resolve()
    state = path.stat()
    seen = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    note = Path(notes) / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    with contextlib.suppress(OarlockError):  # no note, or a damaged one: it is made again
        noted = read_json(note, _Note)
        if noted.seen == seen:
            return noted.sha256
    digest = file_sha256(path)
    if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > 2_000_000_000:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"path": str(path), "seen": seen, "sha256": digest})
    return digest


def settle_file(path: str | Path, most: int = ANYONE) -> None:
    """Give a finished file the permissions the umask asks for (safetensors writes 0600) and have the disk hold it.

    Args:
        most: permissions that it has at most, where not everyone may read what it was made of.
    """
    may_run = os.stat(path).st_mode & 0o100
    os.chmod(path, (most | (most & 0o444) >> 2 if may_run else most) & ~_umask)
    sync_file(path)


def sync_file(path: str | Path) -> None:
    """Have the disk hold what was written to a file (or, for a folder, its list of names)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_vacant(folder: Path) -> bool:
    """Whether a new folder may have this name: nothing is there, or an empty folder.

    A link is one only where this user made it: in a folder for all (/tmp) another could have put it there.
    """
    if folder.is_symlink() and folder.lstat().st_uid != os.geteuid():
        return False
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def require_empty(folder: Path, error: type[OarlockError] = ModelError) -> None:
    """Raise `error` if a new folder can't have this name because something is there."""
    if not is_vacant(folder):
        raise error(f"{folder} is not empty; give a folder that does not exist yet")


@contextlib.contextmanager
def new_folder(output: Path, most: int = ANYONE) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is written; one of that name gives way to it.

    Until then it is this user's alone. After an error nothing of it is left, and an older one is still there.

    Args:
        most: permissions of its files at most (see settle_file).

    Raises:
        ModelError: when the name for the time of writing is taken by something that can't be removed.
    """
    partial, older = output.with_name(f".{output.name}.partial"), output.with_name(f".{output.name}.deleted")
    remove_folder(partial)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(mode=0o700)
        yield partial
        for path in (partial, *partial.rglob("*")):
            if path.is_dir() or path.stat().st_nlink == 1:  # a hard link is a file of somewhere else too
                settle_file(path, most)
        if output.exists():
            remove_folder(older)
            output.rename(older)
        partial.rename(output)
        sync_file(output.parent)
        shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete what an interrupted program left under a name of its own.

    Raises:
        ModelError: when something else has that name: a link, a file, another user's folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        raise ModelError(f"{folder} is in the way, and is not a folder that can be deleted: remove it")


@contextlib.contextmanager
def complete_files(folder: Path, last: str = "") -> Iterator[Path]:
    """A place to write files that go into a folder when all of them are whole; others in it are left alone.

    Args:
        last: the file that comes after all others, since readers go by it.
    """
    partial = folder / ".files.partial"
    remove_folder(partial)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.mkdir(mode=0o700)
        yield partial
        for path in sorted(partial.iterdir(), key=lambda path: (path.name == last, path.name)):
            settle_file(path)
            os.replace(path, folder / path.name)
        sync_file(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text_atomically(path: str | Path, text: str) -> None:
    """Replace a small text file in one step.

    Raises:
        ModelError: for a text with bytes of a name of a file that are no UTF-8.
    """
    path = Path(path)
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        before = text[: error.end].rpartition("\n")[2][-80:]
        raise ModelError(
            f"{path}: can't be written: {before.strip()}... holds a byte that is no UTF-8, as the name of a file or "
            "folder does: rename it"
        ) from error
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.unlink(missing_ok=True)  # of a process of that number that was killed
        with open(partial, "xb") as file:  # not through a link that is there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json_object(path: str | Path) -> dict[str, Any]:
    """A JSON object of a file that may be missing; {} then.

    Raises:
        ModelError: when it is there and is none.
    """
    return read_json_if_there(path, dict[str, Any], limit=TOKENIZER_BYTES) or {}


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON that people can read, in one step."""
    write_text_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def holds_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, as a LoRA, prefix or p-tuning run saves it, or as PEFT does."""
    folder = Path(folder)
    if (folder / ADAPTER_FILE).is_file():
        return True
    whole = (folder / "config.json").is_file() and not any(folder.glob("adapter_model.*"))
    return (folder / PEFT_FILE).is_file() and not whole
