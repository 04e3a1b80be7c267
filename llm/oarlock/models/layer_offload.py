"""Run a model that does not fit into memory: each layer's own parameters are in memory only while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.base.framework import EagerParamBase
from paddlenlp.transformers import PretrainedConfig

from oarlock.errors import ModelError
from oarlock.models.construct import construct, unsplit_config, without_values
from oarlock.models.forward import adapt_inputs
from oarlock.peft.method import Method
from oarlock.weights.copy_into_params import ParameterBuffer
from oarlock.weights.layout import parameter_shards

Reader = Callable[[str, np.ndarray | None], np.ndarray]


def make_empty_model(model_class: Any, config: PretrainedConfig, method: Method | None = None) -> nn.Layer:
    """Construct the model of one card in float32 and evaluation mode, its parameters without memory.

    Raises:
        OarlockError: when the method does not fit the model.
    """
    config = unsplit_config(config)
    config.use_cache = False
    with without_values(), paddle.utils.unique_name.guard():
        model: nn.Layer = construct(model_class, config, "float32")
        adapt_inputs(model)
        if method is not None:
            method.attach(model)
    model.eval()
    return model


def stream_logits(model: nn.Layer, read: Reader, names: set[str], ids: np.ndarray) -> np.ndarray:
    """Compute logits [batch, tokens, vocabulary] of ids [batch, tokens].

    Memory holds the parameters of one layer (a matrix, a norm, an embedding) at a time, and the tensor read last.

    Args:
        model: from make_empty_model(). Every parameter has to be used by the layer that owns it.
        read: returns a whole tensor by its name, and may read it straight into the array.
        names: of tensors that can be read. Other buffers keep the value their layer computed.

    Raises:
        ModelError: when something can't be read, or the model can't be run.
    """
    whole_names = {id(parameter.tensor): parameter.name for parameter in parameter_shards(model)}

    def fill(tensor: paddle.Tensor) -> None:
        target, name = ParameterBuffer(tensor), whole_names[id(tensor)]
        values = read(name, target.array)
        if values is not target.array:
            target.put(0, len(values) if values.ndim else 1, values)

    for parameter in parameter_shards(model):
        if not isinstance(parameter.tensor, EagerParamBase) and parameter.name in names:
            fill(parameter.tensor)
    hooks = [hook for layer in model.sublayers(include_self=True) for hook in _add_hooks(layer, fill)]
    try:
        with paddle.no_grad():
            result = model(input_ids=paddle.to_tensor(ids))
            scores = result[0] if isinstance(result, (tuple, list)) else result
            return scores.astype("float32").numpy()
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:  # PaddleNLP's or Paddle's, of any kind
        raise ModelError(f"{type(model).__name__} can't be run on [batch, tokens] ids alone: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()


def _add_hooks(layer: nn.Layer, fill: Callable[[paddle.Tensor], None]) -> Iterator[Any]:
    own = [parameter for parameter in layer._parameters.values() if parameter is not None]
    if not own:
        return

    def before(*_: Any) -> None:
        for parameter in own:
            fill(parameter)

    def after(*_: Any) -> None:
        for parameter in own:
            parameter._clear_data()

    yield layer.register_forward_pre_hook(before)
    yield layer.register_forward_post_hook(after)
