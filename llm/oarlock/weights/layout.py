"""Which slice of every tensor of the whole model this rank holds.

Names and shapes are those of the model on one card, so weights and checkpoints mean the same under every plan.
Parameters of our decoder know their slice. PaddleNLP's models have functions that cut it out of a tensor
(`_get_tensor_parallel_mappings`); here that becomes plain index ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddlenlp.transformers
from paddle import nn
from paddle.distributed.fleet.meta_parallel import PipelineLayer, SharedLayerDesc

from oarlock.errors import ModelError
from oarlock.weights.tensor_slice import TensorSlice


@dataclass(frozen=True)
class ParameterShard:
    """One tensor of this rank.

    Attributes:
        name: of the whole tensor. An output layer tied to the input embedding has the embedding's name.
        tensor: the local parameter.
        slice: which slice of the whole tensor it is.
    """

    name: str
    tensor: Any
    slice: TensorSlice


def parameter_shards(model: nn.Layer) -> list[ParameterShard]:
    """List all parameters of this rank's unwrapped model in the model's order, each once."""
    state = model.state_dict()
    degree = max(1, getattr(model.config, "tensor_parallel_degree", 1) or 1)
    actions: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    if degree > 1 and getattr(model, "architecture", None) is None:
        # PaddleNLP's functions that cut this rank's slice out of a whole tensor. Parameters of our decoder know theirs.
        actions = type(model).get_tensor_parallel_convert_actions(
            model.config, list(state), is_split=True, ignore_error=True
        )
    found, seen = [], set()
    rename = _full_names(model, state)
    for name, tensor in state.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        split, shape = actions.get(name), tuple(tensor.shape)
        tensor_slice = getattr(tensor, "tensor_slice", None)  # set by our decoder and by fine-tuning methods
        if tensor_slice is None and split is not None and tensor.is_distributed:
            tensor_slice = _find_slice(shape, split, degree, name)
        found.append(ParameterShard(rename(name), tensor, tensor_slice or TensorSlice(shape)))
    return found


def _full_names(model: nn.Layer, state: Mapping[str, Any]) -> Callable[[str], str]:
    """Return a function from a name in the state dict to the name of the whole tensor.

    An output layer tied to the input embedding gets the embedding's name, whichever comes first in the state dict.
    """
    if not isinstance(model, PipelineLayer):
        embedding = model.get_input_embeddings()
        path = next((path for path, layer in model.named_sublayers() if layer is embedding), None)
        tied = state.get(f"{path}.weight")
        return lambda name: f"{path}.weight" if tied is not None and state[name] is tied else name
    paths = model.get_sequential_name_prefixes()
    prefix = ""
    if getattr(model, "architecture", None) is None:  # PaddleNLP's; the names in our own pipelines are complete
        full_class = getattr(paddlenlp.transformers, type(model).__name__.removesuffix("Pipe"), None)
        prefix = getattr(full_class, "base_model_prefix", "")
    # The names in ChatGLM2's pipeline lack the prefix "chatglm_v2.".
    prefix = "" if not prefix or any(path.startswith(prefix) for path in paths.values()) else f"{prefix}."
    shared = [paths[str(i)] for i, layer in enumerate(model._layers_desc) if isinstance(layer, SharedLayerDesc)]
    heads = [path for path in shared[1:] if not path.startswith(shared[0])]
    again = {f"{path}.weight": f"{shared[0]}.embed_tokens.weight" for path in heads}
    return lambda name: prefix + again.get(name, name)


def shared_between_stages(model: nn.Layer) -> dict[str, bool]:
    """Find the parameters that several pipeline stages hold (tied embeddings).

    Fleet marks them with is_firstly_shared, but it compares names of parameters with names of attributes, so those of
    PaddleNLP are never marked (pp_layers.py, Paddle 3.3.1). Fleet's own clipping counts them once per stage.

    Returns:
        Parameter name -> whether this rank's stage is the first that holds it.
    """
    found: dict[str, bool] = {}
    if isinstance(model, PipelineLayer):
        for shared in model.shared_comm.values():
            for attribute in shared["weight_attr"]:
                parameter = getattr(shared["layer"], attribute)
                found[parameter.name] = model.global_rank == min(shared["ranks"])
    return found


def _find_slice(
    local_shape: tuple[int, ...], split: Callable[[np.ndarray], np.ndarray], degree: int, name: str
) -> TensorSlice:
    """Find the axis and the index ranges by splitting arrays that hold their own indices."""
    for axis in (len(local_shape) - 1, 0):
        length = local_shape[axis] * degree
        probe = np.arange(length).reshape([length if i == axis else 1 for i in range(len(local_shape))])
        for tensor_type in (np.asarray, paddle.to_tensor):  # ChatGLM2's functions take Paddle's alone
            try:
                indices = np.asarray(split(tensor_type(probe))).reshape(-1)
            except (AssertionError, ValueError, TypeError):  # the other axis is split, and 1 can't be divided
                continue
            if indices.size == local_shape[axis]:
                breaks = np.flatnonzero(np.diff(indices) != 1) + 1
                runs = tuple((int(run[0]), len(run)) for run in np.split(indices, breaks))
                return TensorSlice((*local_shape[:axis], length, *local_shape[axis + 1 :]), axis, runs)
    raise ModelError(f"{name}: how PaddleNLP splits it among tensor-parallel ranks is not understood")
