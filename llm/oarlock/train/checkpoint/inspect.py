"""Shows a checkpoint, and converts one to a model folder (`oarlock checkpoint`)."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from oarlock.environment import matmul_library
from oarlock.environment.console import get_logger, make_progress_bar
from oarlock.errors import CheckpointError
from oarlock.files import GENERATION_FILE, create_folder, is_vacant
from oarlock.peft.adapter_folder import ADAPTER_FILE, write_adapter_weights
from oarlock.peft.open_adapter import read_adapter_file
from oarlock.train.checkpoint.manifest import read_complete_manifest, read_manifest, verify
from oarlock.weights.folder_files import TEXT_FILES, copy_file, find_files, find_readers
from oarlock.weights.safetensors_file import TensorSource
from oarlock.weights.save import write_weights
from oarlock.weights.shard_index import WEIGHTS
from oarlock.weights.sharded_store import ShardedStore

logger = get_logger(__name__)


def describe_checkpoint(folder: str | Path, with_tensors: bool) -> str:
    """Describe a checkpoint: step, plan, sizes, and optionally every tensor with its shards.

    Raises:
        CheckpointError: if the folder is not a checkpoint.
    """
    manifest = read_manifest(folder)
    with ShardedStore.open(folder) as pieces:
        files: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        lines = [
            f"step            {manifest.step:,}",
            f"samples seen    {manifest.samples:,}",
            f"written by      {manifest.plan or 'an unknown plan'}",
            f"paddle          {manifest.versions.get('paddlepaddle', '?')}, "
            f"paddlenlp {manifest.versions.get('paddlenlp', '?')}",
            *([f"matmul library  {matmul_library.TITLES.get(manifest.products, '?')}"] if manifest.products else []),
        ]
        for name, entry in manifest.files.items():
            what = "shard files" if name.endswith(".safetensors") else "other files"
            files[what] += entry["bytes"]
            counts[what] += 1
        for what, size in files.items():
            lines.append(f"{what:15s} {size:,} bytes in {counts[what]:,} file(s)")
        for kind in pieces.kinds:
            names = list(pieces.names(kind))
            elements = sum(int(np.prod(pieces.shape(kind, name))) for name in names)
            stored = sum(len(pieces.where[f"{kind}/{name}"]) for name in names)
            try:
                dtypes = " and ".join(sorted({pieces.dtype(kind, name) for name in names}))
            except CheckpointError as error:
                dtypes = f"unknown type ({error})"
            lines.append(
                f"{kind:15s} {len(names):,} tensors, {elements:,} elements of {dtypes}, in {stored:,} shard(s)"
            )
        if with_tensors:
            for key in sorted(pieces.where):
                for path, piece in pieces.where[key]:
                    text = str(list(piece.slice.shape))
                    if piece.slice.axis is not None:
                        runs = ", ".join(f"{start}:{start + length}" for start, length in piece.slice.runs)
                        text += f" axis {piece.slice.axis} [{runs}]"
                    if piece.flat:
                        text += f" elements {piece.flat[0]}:{piece.flat[1]}"
                    lines.append(f"  {key} {text} in {path.name}")
    return "\n".join(lines)


def consolidate(folder: str | Path, output: str | Path, max_shard_bytes: int, check: bool = True) -> None:
    """Write the weights of a checkpoint as one model or adapter folder, with one tensor in memory at a time.

    Args:
        max_shard_bytes: largest size of a weight file.
        check: verify the checksums of all files first (that of the manifest always is).

    Raises:
        CheckpointError: if the checkpoint is damaged, or the output folder is not empty or can't be written.
    """
    folder, output = Path(folder), Path(output).resolve()
    if not is_vacant(output):
        raise CheckpointError(f"{output} is not empty; choose a folder that does not exist yet")
    recorded = (verify if check else read_complete_manifest)(folder).files
    adapter = read_adapter_file(folder / ADAPTER_FILE, CheckpointError) if ADAPTER_FILE in recorded else None
    try:
        with create_folder(output, find_readers(folder)) as building:
            with ShardedStore.open(folder) as pieces:
                names = sorted(pieces.names(WEIGHTS))
                sources = [
                    TensorSource(
                        name, pieces.dtype(WEIGHTS, name), pieces.shape(WEIGHTS, name), partial(pieces.read, name)
                    )
                    for name in names
                ]
                total = sum(source.num_bytes for source in sources)
                with make_progress_bar(total, "consolidate", "B", unit_scale=True) as bar:
                    if adapter:
                        write_adapter_weights(sources, adapter, building, bar.update)
                    else:
                        write_weights(sources, building, max_shard_bytes, bar.update)
            for path in find_files(folder, (ADAPTER_FILE if adapter else "config.json", GENERATION_FILE, *TEXT_FILES)):
                name = path.relative_to(folder)
                if name.as_posix() in recorded:
                    (building / name).parent.mkdir(exist_ok=True)
                    copy_file(folder, name, building / name)
    except OSError as error:
        raise CheckpointError(f"{output}: could not be written: {error.strerror or error}") from error
    logger.info(f"{len(names):,} tensors, {total / 1e6:,.1f} MB: {output}")
