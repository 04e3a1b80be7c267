"""Write a model folder that stands on its own: safetensors, config, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarlock.errors import ModelError
from oarlock.files import GENERATION_FILE, complete_files, new_folder, write_json
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
# Fields of a model's configuration that say how this run split and computed it.
_PLAN_KEYS = (
    "tensor_parallel_degree",
    "tensor_parallel_rank",
    "tensor_parallel_output",
    "sequence_parallel",
    "virtual_pp_degree",
    "recompute",
    "recompute_granularity",
    "use_flash_attention",
    "use_fused_rms_norm",
    "use_fast_layer_norm",
    "seq_length",
)
# What PaddleNLP notes about where a tokenizer was loaded from: a path of this machine, of no use on another.
LOCAL_KEYS = ("name_or_path", "_from_auto", "special_tokens_map_file", "tokenizer_file", "vocab_file")


def save_tokenizer(tokenizer: PretrainedTokenizerBase, folder: Path, template: ChatTemplate | None) -> None:
    """The tokenizer's files and the template."""
    tokenizer.save_pretrained(str(folder))
    config_file = folder / "tokenizer_config.json"
    if config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        write_json(config_file, {key: value for key, value in config.items() if key not in LOCAL_KEYS})
    if template is not None:
        template.save(folder)


def save_generation(generation: Mapping[str, Any] | None, folder: Path) -> None:
    """generation_config.json, where there is anything in it."""
    if generation:
        write_json(folder / GENERATION_FILE, generation)


def save_config(model_config: PretrainedConfig, folder: Path, dtype: str | None = None) -> None:
    """config.json of the model on one card, without a trace of the plan it was trained under.

    Args:
        dtype: of the weights beside it; None for that of the configuration.
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
    """Write a model folder, each file complete before it gets its name; other files in it are left alone.

    Args:
        tensors: all weights as on one card; each is read once, in the order of file_order().
        max_shard_bytes: where the weights are cut into several files with an index.
        generation: content of generation_config.json, as the base had it.

    Raises:
        ModelError: when it can't be written; older files of the same names are then still there.
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
        for path in (*folder.glob("model*.safetensors"), folder / INDEX_NAME):  # of an earlier, larger model
            if path.name not in new:
                path.unlink(missing_ok=True)
    except Exception as error:
        raise ModelError(f"{folder}: the model could not be written: {error}") from error


def split_into_files(
    tensors: Sequence[TensorSource], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[list[TensorSource]]:
    """The tensors of each weight file, in the order in which they are written."""
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
    """Refuse to begin what the disk can't hold.

    Raises:
        ModelError: with both sizes.
    """
    needed, free = sum(tensor.num_bytes for tensor in tensors), shutil.disk_usage(output.parent).free
    if needed > free:
        raise ModelError(f"{output}: {what} takes {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free there")


@contextmanager
def create_model_folder(output: Path, what: str, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """A new folder (see files.new_folder), and errors of writing with its name.

    Args:
        sources: folders it is made of: whoever may not read them may not read it.

    Raises:
        ModelError: for an OSError in it.
    """
    try:
        with new_folder(output, find_readers(*sources)) as folder:
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
    """model.safetensors, or several files and their index.

    Args:
        progress: called with the bytes of each tensor once it is written.
        layout: what readers are told: "np" for Paddle's, "pt" for Hugging Face's.

    Returns:
        The name of each weight file -> its size and hash.
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
