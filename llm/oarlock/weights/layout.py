"""Which part of every tensor of the whole model this rank holds.

Names and shapes are those of the model on one card, so that weights and checkpoints mean the same under every plan.
How a tensor is cut is PaddleNLP's knowledge (`_get_tensor_parallel_mappings`); here it becomes plain index ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddlenlp.transformers
from paddle import nn
from paddle.distributed.fleet.meta_parallel import PipelineLayer, SharedLayerDesc

from oarlock.errors import ModelError
from oarlock.weights.tensor_slice import Block


@dataclass(frozen=True)
class Holding:
    """One tensor of this rank.

    Attributes:
        name: of the whole tensor (of the input embedding, where the output layer is tied to it).
        tensor: the local parameter.
        block: what it is of the whole.
    """

    name: str
    tensor: Any
    block: Block


def holdings(model: nn.Layer) -> list[Holding]:
    """All parameters of this rank's (unwrapped) model, each once, in the model's order."""
    state = model.state_dict()
    degree = max(1, getattr(model.config, "tensor_parallel_degree", 1) or 1)
    actions = split_actions(model, state) if degree > 1 else {}
    found, seen = [], set()
    rename = _whole_names(model, state)
    for name, tensor in state.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        split = actions.get(name)
        shape = tuple(tensor.shape)
        block = getattr(tensor, "whole_block", None)  # of what a fine-tuning method put there (see models.methods)
        if block is None:
            block = _block(shape, split, degree, name) if split is not None and tensor.is_distributed else Block(shape)
        found.append(Holding(rename(name), tensor, block))
    return found


def _whole_names(model: nn.Layer, state: Mapping[str, Any]) -> Callable[[str], str]:
    """Name in the state dict -> that of the whole tensor.

    An output layer tied to the input embedding has the embedding's name, whichever comes first in the state dict.
    """
    if not isinstance(model, PipelineLayer):
        embedding = model.get_input_embeddings()
        path = next((path for path, layer in model.named_sublayers() if layer is embedding), None)
        tied = state.get(f"{path}.weight")
        return lambda name: f"{path}.weight" if tied is not None and state[name] is tied else name
    paths, prefix = model.get_sequential_name_prefixes(), _left_out_prefix(model)
    shared = [paths[str(i)] for i, layer in enumerate(model._layers_desc) if isinstance(layer, SharedLayerDesc)]
    heads = [path for path in shared[1:] if not path.startswith(shared[0])]
    again = {f"{path}.weight": f"{shared[0]}.embed_tokens.weight" for path in heads}
    return lambda name: prefix + again.get(name, name)


def _left_out_prefix(model: PipelineLayer) -> str:
    """What a pipeline's names lack of those of the whole model (ChatGLM2's: "chatglm_v2.")."""
    whole = getattr(paddlenlp.transformers, type(model).__name__.removesuffix("Pipe"), None)
    prefix = getattr(whole, "base_model_prefix", "")
    paths = model.get_sequential_name_prefixes().values()
    return "" if not prefix or any(path.startswith(prefix) for path in paths) else f"{prefix}."


def shared_between_stages(model: nn.Layer) -> dict[str, bool]:
    """Parameters that lie on several pipeline stages (tied embeddings): name -> whether this is the first of them.

    Fleet marks them with is_firstly_shared, but compares the names of parameters with those of attributes, so that
    PaddleNLP's never are (pp_layers.py of Paddle 3.3.1); its own clip counts them once for each stage.
    """
    found: dict[str, bool] = {}
    if isinstance(model, PipelineLayer):
        for shared in model.shared_comm.values():
            for attribute in shared["weight_attr"]:
                parameter = getattr(shared["layer"], attribute)
                found[parameter.name] = model.global_rank == min(shared["ranks"])
    return found


def split_actions(model: nn.Layer, names: Iterable[str]) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Name of a whole tensor -> PaddleNLP's function that cuts this rank's part out of it."""
    return type(model).get_tensor_parallel_convert_actions(model.config, list(names), is_split=True, ignore_error=True)


def _block(part: tuple[int, ...], split: Callable[[np.ndarray], np.ndarray], degree: int, name: str) -> Block:
    """Find axis and runs by cutting arrays that hold their own indices."""
    for axis in (len(part) - 1, 0):
        whole_length = part[axis] * degree
        probe = np.arange(whole_length).reshape([whole_length if i == axis else 1 for i in range(len(part))])
        for tensor_type in (np.asarray, paddle.to_tensor):  # ChatGLM2's functions take Paddle's alone
            try:
                cut = np.asarray(split(tensor_type(probe)))
            except (AssertionError, ValueError, TypeError):  # the other axis is cut, and 1 can't be divided
                continue
            if cut.size == part[axis]:
                shape = (*part[:axis], whole_length, *part[axis + 1 :])
                return Block(shape, axis, _runs(cut.reshape(-1)))
    raise ModelError(f"{name}: how PaddleNLP splits it among tensor-parallel ranks is not understood")


def _runs(indices: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Consecutive ranges of a list of indices."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    return tuple((int(run[0]), len(run)) for run in np.split(indices, breaks))
