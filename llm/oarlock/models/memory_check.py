"""Checks whether a model fits into memory, before any of it is allocated."""

from __future__ import annotations

import math
from pathlib import Path

import paddle
from paddle import nn
from paddlenlp.transformers import PretrainedConfig

from oarlock.environment.memory import (
    AvailableMemory,
    check_memory,
    format_bytes,
    measure_available_gpu_memory,
    measure_available_memory,
)
from oarlock.environment.ranks import world_size
from oarlock.errors import ModelError
from oarlock.model_config.size_check import count_least_parameters, count_table_bytes
from oarlock.parallel.nodes import find_node
from oarlock.parallel.object_collectives import run_on_all_ranks
from oarlock.weights.buffers import array_type
from oarlock.weights.copy_into_params import type_name
from oarlock.weights.layout import parameter_shards
from oarlock.weights.sources import check_stored
from oarlock.weights.weight_folder import WeightFolder, has_safetensors

_SMALL_TABLES = 256 << 20  # bytes that any model may keep
_TABLES_TO_WEIGHTS = 8  # times its weights; published models of a million positions keep twice as much


def check_before(config: PretrainedConfig, folder: Path, from_weights: bool, dtype: str) -> None:
    """Refuse a model that is larger than its files, or far too large for this machine, before it is constructed.

    Args:
        config: of the model in the folder.
        from_weights: it gets the weights in the folder, not random ones.
        dtype: of the parameters.

    Raises:
        ModelError: naming the sizes.
    """
    place = f"{folder}/config.json"
    if from_weights and has_safetensors(folder):
        check_stored(config, WeightFolder.open(folder).shapes(), place)
    elif not from_weights:
        least = count_least_parameters(config) * array_type(dtype).itemsize // world_size()
        check_memory(least, f"{place}: a model of these sizes", measure_available())
    check_tables(config, place)


def check_tables(config: PretrainedConfig, place: str) -> None:
    """Refuse more positions than a model of this size has, or than memory can hold tables for.

    Raises:
        ModelError: naming both sizes.
    """
    needed, weights = count_table_bytes(config), 4 * count_least_parameters(config)
    what = f"{place}: the tables for all positions (max_position_embeddings)"
    if needed > max(_SMALL_TABLES, _TABLES_TO_WEIGHTS * weights):
        raise ModelError(
            f"{what} take {format_bytes(needed)}, and the weights only about {format_bytes(weights)}: reduce the "
            "positions to what texts need"
        )
    check_memory(needed, what, measure_available())


def check_parameters(model: nn.Layer, folder: Path, training_bytes: int) -> None:
    """Refuse parameters that do not fit: this rank's on a GPU, those of all ranks of this machine on a CPU.

    Every rank has to call it before the parameters are allocated.

    Args:
        folder: of the model, for messages.
        training_bytes: that training holds per trained parameter.

    Raises:
        ModelError: with both sizes. StoppedWithOthers where another rank raises.
    """
    tensors = list({id(held.tensor): held.tensor for held in parameter_shards(model)}.values())
    needed = sum(map(_count_bytes, tensors))
    needed += training_bytes * sum(math.prod(tensor.shape) for tensor in tensors if not tensor.stop_gradient)
    node, of = find_node(), ""
    if not paddle.device.get_device().startswith("gpu") and len(node.ranks) > 1:
        needed, of = sum(node.all_gather_objects(needed)), f" on the {len(node.ranks)} ranks of this machine"
    what = f"{folder}: the model{', with gradients and optimizer states,' if training_bytes else ''}{of}"
    run_on_all_ranks(lambda: check_memory(needed, what, measure_available()))


def _count_bytes(tensor: paddle.Tensor) -> int:
    if hasattr(tensor, "when_filled"):  # it becomes 4 bits an element, and its scales (see models.qlora)
        return math.prod(tensor.shape) // 2
    return math.prod(tensor.shape) * array_type(type_name(tensor)).itemsize


def measure_available() -> AvailableMemory | None:
    """Available memory of the current device; None if the system does not tell."""
    device = paddle.device.get_device()
    return measure_available_gpu_memory(device) if device.startswith("gpu") else measure_available_memory()
