"""Write a complete model folder: safetensors, config, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarlock.errors import ModelError
from oarlock.files import GENERATION_FILE, complete_files, create_folder, write_json
from oarlock.weights.folder_files import find_readers
from oarlock.weights.safetensors_file import (
    FileRecord,
    TensorSource,
    find_main_dtype,
    sort_for_file,
    write_safetensors,
)
from oarlock.weights.weight_folder import INDEX_NAME

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedConfig, PretrainedTokenizerBase

    from oarlock.data.templates.chat_template import ChatTemplate

MAX_SHARD_BYTES = 5_000_000_000
# Fields of a model's configuration about how this run split and computed it.
_PLAN_KEYS = (
    "tensor_parallel_degree",
    "tensor_parallel_rank",
    "tensor_parallel_output",
    "expert_parallel_degree",
    "expert_parallel_rank",
    "sequence_parallel",
    "virtual_pp_degree",
    "recompute",
    "recompute_granularity",
    "use_flash_attention",
    "use_fused_rms_norm",
    "use_fast_layer_norm",
    "seq_length",
)
# PaddleNLP records here where a tokenizer was loaded from, a path on this machine.
LOCAL_KEYS = ("name_or_path", "_from_auto", "special_tokens_map_file", "tokenizer_file", "vocab_file")


def save_tokenizer(tokenizer: PretrainedTokenizerBase, folder: Path, template: ChatTemplate | None) -> None:
    """Write the tokenizer's files and the template."""
    tokenizer.save_pretrained(str(folder))
    config_file = folder / "tokenizer_config.json"
    if config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        write_json(config_file, {key: value for key, value in config.items() if key not in LOCAL_KEYS})
    if template is not None:
        template.save(folder)


def save_generation(generation: Mapping[str, Any] | None, folder: Path) -> None:
    """Write generation_config.json unless its content is empty."""
    if generation:
        write_json(folder / GENERATION_FILE, generation)


def save_config(model_config: PretrainedConfig, folder: Path, dtype: str | None = None) -> None:
    """Write config.json of the model on one card, without the fields of the plan it was trained under.

    Args:
        dtype: of the weights in the folder; None for that of the configuration.
    """
    content = model_config.to_diff_dict() | {"dtype": dtype or model_config.dtype}
    for name in _PLAN_KEYS:
        content.pop(name, None)
    content["architectures"] = [name.removesuffix("Pipe") for name in model_config.architectures or []]
    write_json(folder / "config.json", content)


def save_model(
    tensors: Sequence[TensorSource],
    model_config: PretrainedConfig,
    tokenizer: PretrainedTokenizerBase | None,
    template: ChatTemplate | None,
    folder: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder. Each file is complete before it gets its name; other files in the folder stay.

    Args:
        tensors: all weights as on one card. Each is read once, in the order of split_into_files().
        max_shard_bytes: largest weight file. More weights are split into several files with an index.
        generation: content of the base's generation_config.json.

    Raises:
        ModelError: when it can't be written. Older files of the same names are kept in that case.
    """
    folder = Path(folder)
    try:
        with complete_files(folder) as partial:
            write_weights(tensors, partial, max_shard_bytes)
            save_config(model_config, partial, find_main_dtype(tensors))
            save_generation(generation, partial)
            if tokenizer is not None:
                save_tokenizer(tokenizer, partial, template)
            new = {path.name for path in partial.iterdir()}
        for path in (
            *folder.glob("model*.safetensors"),
            folder / INDEX_NAME,
        ):  # left over from an earlier, larger model
            if path.name not in new:
                path.unlink(missing_ok=True)
    except Exception as error:
        raise ModelError(f"{folder}: the model could not be written: {error}") from error


def split_into_files(
    tensors: Sequence[TensorSource], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[list[TensorSource]]:
    """Group tensors by weight file, in the order in which they are written."""
    shards: list[list[TensorSource]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return [sort_for_file(shard) for shard in shards]


def check_space(tensors: Sequence[TensorSource], output: Path, what: str) -> None:
    """Refuse to start a write that the disk can't hold.

    Raises:
        ModelError: with both sizes.
    """
    needed, free = sum(tensor.num_bytes for tensor in tensors), shutil.disk_usage(output.parent).free
    if needed > free:
        raise ModelError(f"{output}: {what} takes {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free there")


@contextmanager
def create_model_folder(output: Path, what: str, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """Create a new folder (files.create_folder). Errors while writing name it.

    Args:
        sources: folders it is made of. Users who may not read them may not read it either.

    Raises:
        ModelError: for an OSError in the context.
    """
    try:
        with create_folder(output, find_readers(*sources)) as folder:
            yield folder
    except OSError as error:
        raise ModelError(f"{output}: {what} could not be written: {error.strerror or error}") from error


def write_weights(
    tensors: Sequence[TensorSource],
    folder: Path,
    max_shard_bytes: int,
    progress: Callable[[int], Any] | None = None,
    layout: str = "np",
) -> dict[str, FileRecord]:
    """Write model.safetensors, or several files and their index.

    Args:
        progress: called with the bytes of each tensor once it is written.
        layout: for the files' metadata: "np" for Paddle's, "pt" for Hugging Face's.

    Returns:
        Name of each weight file -> its size and hash.
    """
    shards, metadata = split_into_files(tensors, max_shard_bytes), {"format": layout}
    if len(shards) == 1:
        name = "model.safetensors"
        return {name: write_safetensors(folder / name, shards[0], metadata, progress)}
    weight_map: dict[str, str] = {}
    records = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        records[name] = write_safetensors(folder / name, shard, metadata, progress)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.num_bytes for tensor in tensors)
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return records
