"""Grow a model's embedding for a tokenizer to which tokens were added."""

from __future__ import annotations

from contextlib import closing
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
from paddle.base.framework import EagerParamBase

from oarlock.data.templates.chat_template import choose_template, find_own_template
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.environment.console import get_logger, make_progress_bar
from oarlock.environment.paddle_import import on_cpu
from oarlock.errors import ModelError
from oarlock.files import require_empty
from oarlock.model_config.load import find_model_class, read_config
from oarlock.models.layer_offload import make_empty_model
from oarlock.models.open_weights import open_weights
from oarlock.weights.buffers import array_type
from oarlock.weights.folder_files import copy_file
from oarlock.weights.layout import parameter_shards
from oarlock.weights.load import Request, check_source
from oarlock.weights.safetensors_file import TensorSource
from oarlock.weights.save import (
    MAX_SHARD_BYTES,
    check_space,
    create_model_folder,
    save_config,
    save_tokenizer,
    write_weights,
)
from oarlock.weights.sources import WeightSource, stored_dtype

logger = get_logger(__name__)

MULTIPLE = 64  # rows; tensor parallelism splits them evenly, and matrix products are fast
_WHAT = "the resized model"


def resize_embedding(
    model: Path,
    tokenizer_name: str,
    output: Path,
    multiple_of: int = MULTIPLE,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_pickle: bool = False,
) -> int:
    """Write a model folder in Paddle's layout whose embedding and output layer have a row per token; on the CPU.

    New rows are the mean of the old ones, so a new token starts as an average one (Hewitt 2021). All other tensors are
    copied bit by bit, and the tokenizer is copied too.

    Args:
        model: folder in either layout.
        tokenizer_name: folder or hub name.
        multiple_of: the number of rows is rounded up to a multiple of it.

    Returns:
        The new number of rows.

    Raises:
        ModelError: when there are enough rows, or something can't be read or written.
    """
    output = output.resolve()
    require_empty(output)
    config, tokenizer = read_config(model), load_tokenizer(tokenizer_name)
    before, needed = config.vocab_size, len(tokenizer)
    if needed <= before:
        raise ModelError(
            f"{model} has {before:,} rows (vocab_size) and the tokenizer {tokenizer_name} needs {needed:,}: there is "
            "nothing to add"
        )
    grown = deepcopy(config)
    grown.vocab_size = -(-needed // multiple_of) * multiple_of
    whole = find_model_class(config)
    with (
        on_cpu(),
        closing(open_weights(model, whole, config, allow_pickle, read_ahead=False)) as source,
        create_model_folder(output, _WHAT, [model]) as folder,
    ):
        old = {parameter.name: parameter for parameter in parameter_shards(make_empty_model(whole, config))}
        new = {parameter.name: parameter.slice.shape for parameter in parameter_shards(make_empty_model(whole, grown))}
        changed = [name for name in new if new[name] != old[name].slice.shape]
        if not changed:
            raise ModelError(f"{model}: the embedding of {config.model_type} models does not follow vocab_size")
        requests = [
            Request(name, parameter.slice, "float32", not isinstance(parameter.tensor, EagerParamBase))
            for name, parameter in old.items()
        ]
        tensors = []
        for name in check_source(source, requests):
            stored = stored_dtype(source, name)
            read = partial(_read_grown, source, name, old[name].slice.shape, new[name], array_type(stored))
            tensors.append(TensorSource(name, stored, new[name], read))
        check_space(tensors, output, _WHAT)
        with make_progress_bar(sum(tensor.num_bytes for tensor in tensors), "resize", "B", unit_scale=True) as bar:
            write_weights(tensors, folder, max_shard_bytes, bar.update)
        save_config(grown, folder)
        own = find_own_template(tokenizer) is not None
        save_tokenizer(tokenizer, folder, choose_template("tokenizer", tokenizer, "") if own else None)
        settings = model / "generation_config.json"
        if settings.is_file():
            copy_file(model, settings.name, folder / settings.name)
    names = ", ".join(changed)
    logger.info(f"{model} -> {output}: {before:,} rows became {grown.vocab_size:,} ({names}), for {needed:,} tokens")
    return int(grown.vocab_size)


def _read_grown(
    source: WeightSource, name: str, old: tuple[int, ...], new: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Read a tensor and fill what it lacks with the mean along the axis that grew."""
    values = source.read(name)
    if old == new:
        return values
    axis = next(i for i, (before, after) in enumerate(zip(old, new, strict=True)) if before != after)
    mean = values.astype(np.float32).mean(axis=axis, keepdims=True, dtype=np.float64).astype(dtype)
    return np.concatenate([values, np.repeat(mean, new[axis] - old[axis], axis=axis)], axis=axis)
