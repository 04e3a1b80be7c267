"""One save of a checkpoint: every rank writes its own file, then rank 0 renames the folder."""

from __future__ import annotations

import contextlib
import functools
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
from oarlock.train.output.folder_guard import check_output_dir
from oarlock.weights.safetensors_file import FileRecord, TensorSource, write_safetensors
from oarlock.weights.shard_index import StoredShard, shard_file_name, write_index

_POLL_S = 0.05
_DONE = ".done.json"


class PendingSave:
    """A checkpoint that is being written.

    Args:
        tensors: the shards that this rank writes.
        manifest: the checkpoint's manifest, without the list of files.
        partial: existing folder to write into.
        final: the path that the folder is renamed to.
        copy: copy the tensors now, so that training can continue while they are written.

    Attributes:
        copy_seconds: time for the copy (of one rank), 0 without one.
        write_seconds: time from the first byte to the complete checkpoint (on rank 0).
    """

    def __init__(
        self,
        tensors: Iterable[tuple[StoredShard, paddle.Tensor]],
        manifest: Manifest,
        partial: Path,
        final: Path,
        copy: bool,
    ) -> None:
        self.manifest, self.partial, self.final = manifest, partial, final
        self._pieces: list[StoredShard] = []
        self._sources: list[TensorSource] = []
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        started = time.perf_counter()
        for piece, tensor in tensors:
            self._pieces.append(piece)
            # bfloat16 comes as its bits in uint16. numpy() copies, on a CPU too.
            read: Callable[[], np.ndarray] = functools.partial(np.asarray, tensor.numpy()) if copy else tensor.numpy
            dtype = str(tensor.dtype).rsplit(".", 1)[-1]
            self._sources.append(TensorSource(piece.key, dtype, tuple(tensor.shape), read))
        self._writing_since = time.perf_counter()
        self.copy_seconds = self._writing_since - started if copy else 0.0
        self.write_seconds = 0.0

    def write(self) -> dict[str, Any]:
        """Write this rank's file.

        Returns:
            What rank 0 has to know about it: name, checksum, shards; and the error, if there was one, for its log.
        """
        part: dict[str, Any] = {"file": shard_file_name(rank()), "error": None}
        try:
            record = write_safetensors(self.partial / part["file"], self._sources, {"format": "oarlock"})
            part |= {"record": asdict(record), "pieces": {piece.key: piece.to_json() for piece in self._pieces}}
        except Exception as error:
            self._error, part["error"] = error, str(error) or type(error).__name__
            with contextlib.suppress(OSError):
                (self.partial / part["file"]).unlink()  # frees space on a full disk
        self._sources = []
        return part

    def commit(self, parts: Sequence[dict[str, Any]]) -> None:
        """On rank 0, after all ranks have written: write index and manifest, and rename the folder.

        Args:
            parts: what write() returned on each rank.

        Raises:
            Exception: the error of the first rank that could not write its file.
        """
        for i, part in enumerate(parts):
            if part["error"]:
                raise self._error or CheckpointError(f"rank {i}: {part['error']}")
            if part["file"] != shard_file_name(i):
                raise CheckpointError(f"rank {i} reports {part['file']!r} as its file")
        pieces = {part["file"]: [StoredShard.from_json(*item) for item in part["pieces"].items()] for part in parts}
        write_index(self.partial, pieces)
        for path in self.partial.glob(f"*{_DONE}"):
            path.unlink()
        self.manifest.seal(self.partial, {part["file"]: FileRecord(**part["record"]) for part in parts})
        check_output_dir(self.final.parent)
        if self.final.exists():
            delete_folder(self.final)
        self.partial.rename(self.final)
        sync_file(self.final.parent)
        self.write_seconds = time.perf_counter() - self._writing_since

    # In the background the ranks communicate through files: a collective could interleave with those of training.

    def start(self, timeout_s: float, on_end: Callable[[Exception | None], None]) -> None:
        """Write in a background thread.

        Args:
            timeout_s: how long rank 0 waits for the other ranks.
            on_end: called in that thread at the end, with the error if there was one.
        """
        self._thread = threading.Thread(target=self._run, args=(timeout_s, on_end), name="save", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the background thread.

        Raises:
            Exception: the error of the thread.
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
                deadline = time.monotonic() + timeout_s
                parts = []
                for i in range(world_size()):
                    done = self.partial / f"{shard_file_name(i)}{_DONE}"
                    while not done.exists():
                        if time.monotonic() > deadline:
                            raise CheckpointError(f"rank {i} did not finish writing in time (--collective_timeout)")
                        time.sleep(_POLL_S)
                    parts.append(read_json(done, dict[str, Any], error=CheckpointError, limit=INDEX_BYTES))
                    if parts[i].get("file") != shard_file_name(i):
                        raise CheckpointError(f"{done}: was not written by rank {i}")
                self.commit(parts)
        except Exception as error:
            self._error = error
        on_end(self._error)


def delete_folder(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a half-deleted folder can't look like a damaged checkpoint."""
    hidden = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
