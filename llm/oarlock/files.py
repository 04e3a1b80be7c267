"""Writing files atomically, and their checksums."""

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

ADAPTER_FILE = "adapter.json"  # marks an adapter folder (see oarlock.peft.adapter_folder)
PEFT_FILE, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT saves an adapter
GENERATION_FILE = "generation_config.json"
_BLOCK = 1 << 22
_umask = os.umask(0)  # reading the umask sets it, for all threads: done once, while there is one thread
os.umask(_umask)
ANYONE = 0o666  # the widest permissions of a file, before the umask


def keep_private() -> None:
    """Make all files that this process and its children write from now on readable by their user only."""
    global _umask
    _umask = 0o077
    os.umask(_umask)


def umask() -> int:
    """The umask of this process."""
    return _umask


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Let one process at a time run the block (flock on a file that stays; the kernel releases a dead one's lock)."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compute_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content in hex, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return stream_sha256(file)


def stream_sha256(file: BinaryIO) -> str:
    """Return the SHA-256 in hex of the rest of an open file."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Note:
    """The checksum of a file, and the size, times and inode it had then."""

    seen: list[int]
    sha256: str


def compute_sha256_cached(path: str | Path, notes: str | Path) -> str:
    """Return compute_sha256, computed again only if the file changed since the last call.

    A file changed within the last two seconds is not cached, since its times might not show the next change.

    Args:
        notes: folder of the cached checksums.
    """
    path = Path(path).resolve()
    state = path.stat()
    seen = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    note = Path(notes) / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    with contextlib.suppress(OarlockError):  # a missing or damaged note is made again
        noted = read_json(note, _Note)
        if noted.seen == seen:
            return noted.sha256
    digest = compute_sha256(path)
    if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > 2_000_000_000:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"path": str(path), "seen": seen, "sha256": digest})
    return digest


def settle_file(path: str | Path, most: int = ANYONE) -> None:
    """Set the permissions of a finished file by the umask (safetensors writes 0600), and sync it to disk.

    Args:
        most: the widest permissions, for a file made from private files.
    """
    may_run = os.stat(path).st_mode & 0o100
    os.chmod(path, (most | (most & 0o444) >> 2 if may_run else most) & ~_umask)
    sync_file(path)


def sync_file(path: str | Path) -> None:
    """Sync a file to disk, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_vacant(folder: Path) -> bool:
    """Whether a new folder may have this name: nothing or an empty folder is there.

    A symbolic link counts only if this user made it. In a shared folder (/tmp) another user may have placed it.
    """
    if folder.is_symlink() and folder.lstat().st_uid != os.geteuid():
        return False
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def require_empty(folder: Path, error: type[OarlockError] = ModelError) -> None:
    """Raise `error` if a new folder can't have this name because something is there."""
    if not is_vacant(folder):
        raise error(f"{folder} is not empty; give a folder that does not exist yet")


@contextlib.contextmanager
def create_folder(output: Path, most: int = ANYONE) -> Iterator[Path]:
    """Yield a private temporary folder that is renamed to `output` at the end, replacing an older one.

    After an error nothing of it is left, and the older folder is unchanged.

    Args:
        most: the widest permissions of its files (see settle_file).

    Raises:
        ModelError: if something that can't be removed has the temporary name.
    """
    partial, older = output.with_name(f".{output.name}.partial"), output.with_name(f".{output.name}.deleted")
    remove_folder(partial)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(mode=0o700)
        yield partial
        for path in (partial, *partial.rglob("*")):
            if path.is_dir() or path.stat().st_nlink == 1:  # a hard link is shared with another folder
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
    """Delete the temporary folder of an interrupted program.

    Raises:
        ModelError: if a link, a file or another user's folder has that name.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        raise ModelError(f"{folder} is in the way and is not a folder that can be deleted. Remove it")


@contextlib.contextmanager
def complete_files(folder: Path, last: str = "") -> Iterator[Path]:
    """Yield a temporary folder whose files are moved into `folder` at the end. Other files there stay.

    Args:
        last: the file to move last, because readers look for it.
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
    """Replace a small text file atomically.

    Raises:
        ModelError: if the text holds the name of a file that is not valid UTF-8.
    """
    path = Path(path)
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        before = text[: error.end].rpartition("\n")[2][-80:]
        raise ModelError(
            f"{path}: can't be written: {before.strip()}... holds a byte that is not UTF-8, from the name of a file or "
            "folder. Rename it"
        ) from error
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.unlink(missing_ok=True)  # left by a killed process with this PID
        with open(partial, "xb") as file:  # never through an existing link
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file. Return {} if the file is missing.

    Raises:
        ModelError: if the file is not a JSON object.
    """
    return read_json_if_there(path, dict[str, Any], limit=TOKENIZER_BYTES) or {}


def write_json(path: str | Path, content: Any) -> None:
    """Write indented JSON atomically."""
    write_text_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def holds_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, saved by a LoRA, prefix or p-tuning run or by PEFT."""
    folder = Path(folder)
    if (folder / ADAPTER_FILE).is_file():
        return True
    whole = (folder / "config.json").is_file() and not any(folder.glob("adapter_model.*"))
    return (folder / PEFT_FILE).is_file() and not whole
