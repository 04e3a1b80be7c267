"""One save of a checkpoint: every rank writes its own part, rank 0 makes it a checkpoint by renaming the folder."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from oarlock.environment.ranks import is_first_rank, rank, world_size
from oarlock.errors import CheckpointError
from oarlock.files import sync_file, write_json
from oarlock.formats.json_file import INDEX_BYTES, read_json
from oarlock.train.checkpoint.manifest import Manifest
from oarlock.train.output.folder_guard import check_output
from oarlock.weights.safetensors_file import FileRecord, TensorSource, write_safetensors
from oarlock.weights.shard_index import Piece, part_name, write_index

_POLL_S = 0.05
_DONE = ".done.json"


class PendingSave:
    """A checkpoint that is being written.

    Args:
        tensors: what this rank writes, and where it belongs.
        manifest: what the checkpoint will say about itself.
        partial: the folder to write into; it exists.
        final: what that folder is renamed to.
        copy: copy the tensors now, so that training can go on while they are written.

    Attributes:
        copy_seconds: time for the copy (of one rank), 0 without one.
        write_seconds: time from the first byte to the complete checkpoint (on rank 0).
    """

    def __init__(
        self, tensors: Iterable[tuple[Piece, paddle.Tensor]], manifest: Manifest, partial: Path, final: Path, copy: bool
    ) -> None:
        self.manifest, self.partial, self.final = manifest, partial, final
        self._pieces: list[Piece] = []
        self._sources: list[TensorSource] = []
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        started = time.perf_counter()
        for piece, tensor in tensors:
            self._pieces.append(piece)
            read = _copied(tensor) if copy else _reader(tensor)
            dtype = str(tensor.dtype).rsplit(".", 1)[-1]
            self._sources.append(TensorSource(piece.key, dtype, tuple(tensor.shape), read))
        self._writing_since = time.perf_counter()
        self.copy_seconds = self._writing_since - started if copy else 0.0
        self.write_seconds = 0.0

    @property
    def timing(self) -> str:
        """For the log: how long training waited, and how long it took."""
        copied = f"copied in {self.copy_seconds:.1f} s, " if self.copy_seconds else ""
        return f"{copied}written in {self.write_seconds:.1f} s"

    def write(self) -> dict[str, Any]:
        """Write this rank's part; returns what rank 0 must know of it, an error too (rank 0 speaks on the console)."""
        part: dict[str, Any] = {"file": part_name(rank()), "error": None}
        try:
            record = write_safetensors(self.partial / part["file"], self._sources, {"format": "oarlock"})
            part |= {"record": asdict(record), "pieces": {piece.key: piece.to_json() for piece in self._pieces}}
        except Exception as error:
            self._error, part["error"] = error, str(error) or type(error).__name__
            with contextlib.suppress(OSError):
                (self.partial / part["file"]).unlink()  # on a full disk, room for the others and for saying so
        self._sources = []
        return part

    def commit(self, parts: Sequence[dict[str, Any]]) -> None:
        """On rank 0, when all parts are there: index, manifest, rename.

        Raises:
            Exception: what stopped a rank from writing its part.
        """
        for i, part in enumerate(parts):
            if part["error"]:
                raise self._error or CheckpointError(f"rank {i}: {part['error']}")
            if part["file"] != part_name(i):
                raise CheckpointError(f"rank {i} says that its part is {part['file']!r}")
        pieces = {part["file"]: [Piece.from_json(*item) for item in part["pieces"].items()] for part in parts}
        write_index(self.partial, pieces)
        for path in self.partial.glob(f"*{_DONE}"):
            path.unlink()
        self.manifest.seal(self.partial, {part["file"]: FileRecord(**part["record"]) for part in parts})
        check_output(self.final.parent)
        if self.final.exists():
            delete_folder(self.final)
        self.partial.rename(self.final)
        sync_file(self.final.parent)
        self.write_seconds = time.perf_counter() - self._writing_since

    # in the background: the ranks tell each other by files, since no collective may run beside those of training

    def start(self, timeout_s: float, on_end: Callable[[Exception | None], None]) -> None:
        """Write in a thread of its own.

        Args:
            timeout_s: how long rank 0 waits for the others' parts.
            on_end: called in that thread, with the error if there was one.
        """
        self._thread = threading.Thread(target=self._run, args=(timeout_s, on_end), name="save", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the thread.

        Raises:
            Exception: what went wrong in it.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _run(self, timeout_s: float, on_end: Callable[[Exception | None], None]) -> None:
        part = self.write()
        try:
            write_json(self.partial / f"{part['file']}{_DONE}", part)
            if is_first_rank():
                self.commit(self._all_parts(timeout_s))
        except Exception as error:
            self._error = error
        on_end(self._error)

    def _all_parts(self, timeout_s: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        parts = []
        for i in range(world_size()):
            done = self.partial / f"{part_name(i)}{_DONE}"
            while not done.exists():
                if time.monotonic() > deadline:
                    raise CheckpointError(f"rank {i} did not finish its part in {timeout_s:,.0f} s")
                time.sleep(_POLL_S)
            part = read_json(done, dict[str, Any], error=CheckpointError, limit=INDEX_BYTES)
            if part.get("file") != part_name(i):
                raise CheckpointError(f"{done}: not what rank {i} wrote")
            parts.append(part)
        return parts


def delete_folder(path: Path) -> None:
    """Out of sight in one step first: a half-deleted folder must not look like a damaged checkpoint."""
    hidden = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _reader(tensor: paddle.Tensor) -> Callable[[], np.ndarray]:
    return lambda: tensor.numpy()  # bfloat16 comes as its bits in uint16


def _copied(tensor: paddle.Tensor) -> Callable[[], np.ndarray]:
    values = tensor.numpy()  # has memory of its own, on a CPU too
    return lambda: values
