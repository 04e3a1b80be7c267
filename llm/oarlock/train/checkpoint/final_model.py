"""The trained model or adapter as one folder, gathered from all ranks one tensor at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist

from oarlock.environment.ranks import is_first_rank, rank
from oarlock.merge.inputs import AdapterMix
from oarlock.merge.merge import MergeOptions, merge
from oarlock.parallel.object_collectives import all_gather_objects, run_on_all_ranks
from oarlock.peft.adapter_folder import save_adapter
from oarlock.train.checkpoint.local_shards import LocalShard, LocalShards
from oarlock.train.checkpoint.model_files import ModelFiles
from oarlock.weights.layout import TensorSlice
from oarlock.weights.safetensors_file import TensorSource, sort_for_file
from oarlock.weights.save import save_model, split_into_files
from oarlock.weights.shard_index import StoredShard

MERGED = "merged"


def save_final_model(shards: LocalShards, files: ModelFiles, folder: Path) -> None:
    """Gather the model on rank 0, which writes it. Rank 0 holds one full tensor and one shard at a time.

    Raises:
        ModelError: if it can't be written.
    """
    mine = {shard.parameter.name: shard for shard in shards if shard.writer and shard.elements}
    described = {
        name: (
            str(shard.parameter.tensor.dtype).rsplit(".", 1)[-1],
            StoredShard("", name, shard.parameter.slice, shard.flat),
        )
        for name, shard in mine.items()
    }
    holders: dict[str, list[tuple[int, StoredShard]]] = {}
    dtypes: dict[str, str] = {}
    for source, pieces in enumerate(all_gather_objects(described)):
        for name, (dtype, piece) in pieces.items():
            holders.setdefault(name, []).append((source, piece))
            dtypes[name] = dtype
    collector = _Collector(mine, holders, dtypes)
    tensors = [
        TensorSource(name, dtypes[name], holders[name][0][1].slice.shape, partial(collector.collect, name))
        for name in sorted(holders)
    ]
    method, base = files.method, files.base
    weight_files = split_into_files(tensors) if method is None else [sort_for_file(tensors)]
    order = [tensor.name for weight_file in weight_files for tensor in weight_file]

    def write() -> None:
        try:
            if method is None:
                save_model(tensors, files.config, files.tokenizer, files.template, folder, generation=files.generation)
            else:
                assert base is not None
                save_adapter(tensors, method, base, files.tokenizer, files.template, folder)
        finally:
            for name in order:  # after an error, the rest must still be received
                if name not in collector.collected:
                    collector.collect(name)

    def send() -> None:
        for name in order:
            if name in mine:
                dist.send(mine[name].data.contiguous(), dst=0)

    run_on_all_ranks(write if is_first_rank() else send)


def merge_adapter(folder: Path, base: Path, allow_pickle: bool) -> None:
    """On rank 0, merge the LoRA adapter in a folder into its base, as folder/merged; the other ranks wait.

    Raises:
        ModelError: as oarlock.merge.merge does.
    """
    options = MergeOptions(allow_pickle=allow_pickle, replace=True)
    run_on_all_ranks(lambda: merge(base, AdapterMix.open([folder]), folder / MERGED, options), first_rank_only=True)


class _Collector:
    """On rank 0: assembles full tensors from the shards of all ranks."""

    def __init__(
        self, mine: dict[str, LocalShard], holders: dict[str, list[tuple[int, StoredShard]]], dtypes: dict[str, str]
    ) -> None:
        self._mine, self._holders, self._dtypes = mine, holders, dtypes
        self.collected: set[str] = set()

    def collect(self, name: str) -> np.ndarray:
        """Receive and assemble a tensor (bfloat16 as its bits in uint16)."""
        self.collected.add(name)
        whole: np.ndarray | None = None
        flats: dict[TensorSlice, np.ndarray] = {}
        for source, piece in self._holders[name]:
            values = self._receive(name, source, piece)
            if whole is None:
                whole = np.empty(piece.slice.shape, values.dtype)
            if piece.flat is None:
                piece.slice.put(values.reshape(piece.slice.local_shape), whole)
                continue
            flat = flats.setdefault(piece.slice, np.empty([int(np.prod(piece.slice.local_shape))], values.dtype))
            flat[piece.flat[0] : piece.flat[1]] = values
        assert whole is not None
        for block, flat in flats.items():
            block.put(flat.reshape(block.local_shape), whole)
        return whole

    def _receive(self, name: str, source: int, piece: StoredShard) -> np.ndarray:
        if source == rank():
            return self._mine[name].data.numpy()
        shape = [piece.flat[1] - piece.flat[0]] if piece.flat is not None else list(piece.slice.local_shape)
        buffer = paddle.empty(shape, dtype=self._dtypes[name])
        dist.recv(buffer, src=source)
        return buffer.numpy()
