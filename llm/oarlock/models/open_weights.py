"""Open the weights of a model folder. Tensors that the model has no place for are refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from paddlenlp.transformers import PretrainedConfig

from oarlock.environment.console import get_logger
from oarlock.errors import ModelError
from oarlock.models.layer_offload import make_empty_model
from oarlock.models.memory_check import check_tables
from oarlock.weights.buffers import row_ranges
from oarlock.weights.layout import parameter_shards
from oarlock.weights.pickles import PickleSource
from oarlock.weights.sources import EMBEDDINGS, FileSource, SafetensorsSource
from oarlock.weights.weight_folder import WeightFolder, has_safetensors

# Tables that the layers compute themselves. Some published files contain them.
_COMPUTED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.attn\.(masked_)?bias$")
_HEADS = ("lm_head.weight", "lm_head.decoder_weight")
_COMPARED_BYTES = 16 << 20

logger = get_logger(__name__)


def open_weights(
    folder: Path, model_class: Any, config: Any, allow_pickle: bool = False, read_ahead: bool = True
) -> FileSource:
    """Open a model's weights: its safetensors, or its pickles if they are allowed.

    Args:
        read_ahead: keep two tensors in memory, so that one can be read while the other is in use.

    Raises:
        ModelError: when there is nothing to read, it is damaged, or has tensors that the model does not use.
    """
    source: FileSource
    if allow_pickle and not has_safetensors(folder):
        logger.info(f"{folder}: reading pickled weights, as you allowed")
        source = PickleSource(folder, model_class, config)
    else:
        source = SafetensorsSource(WeightFolder.open(folder), model_class, config, read_ahead)
    try:
        check_tables(config, str(folder / "config.json"))
        check_unused(source, model_class, config)
    except BaseException:
        source.close()
        raise
    return source


def check_unused(source: FileSource, model_class: Any, config: PretrainedConfig) -> None:
    """Refuse tensors that the model does not use.

    Tables that the model computes itself are allowed, and so is a copy of a tied embedding with the same values.

    Raises:
        ModelError: naming them.
    """
    held = {parameter.name for parameter in parameter_shards(make_empty_model(model_class, config))}
    embedding = next((name for name in source.shapes if name in held and name.endswith(EMBEDDINGS)), None)
    extra = []
    for name in (*source.left_over, *(name for name in source.shapes if name not in held)):
        if _COMPUTED.search(name):
            continue
        if embedding is not None and name in _HEADS:
            if _have_same_values(source, name, embedding):
                continue
            raise ModelError(
                f"{source.place}: config.json ties the output layer to the embedding (tie_word_embeddings), and "
                f'{name} in the files has other values: set "tie_word_embeddings": false, or remove the tensor'
            )
        extra.append(name)
    if extra:
        total = len(source.left_over) + len(source.shapes)
        raise ModelError(
            f"{source.place}: {_describe_names(extra, total)} left over: the architecture in config.json has no place "
            f"for {'it' if len(extra) == 1 else 'them'}"
        )


def _describe_names(names: list[str], total: int) -> str:
    """Count names and show the first ones, as part of a sentence."""
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"{len(names)} of {total} weights ({shown}) {'is' if len(names) == 1 else 'are'}"


def _have_same_values(source: FileSource, one: str, other: str) -> bool:
    """Compare two stored tensors bit by bit."""
    first = source.read(one)
    first = first if source.read_ahead else first.copy()
    second = source.read(other)
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    rows = row_ranges(first.shape, first.dtype.itemsize, _COMPARED_BYTES)
    return all(_view_bytes(first[a:b]) == _view_bytes(second[a:b]) for a, b in rows)


def _view_bytes(rows: np.ndarray) -> memoryview:
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
