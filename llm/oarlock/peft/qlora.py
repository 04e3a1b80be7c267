"""LoRA layers over a 4-bit base. Weights are quantized one by one as they are loaded."""

from __future__ import annotations

from functools import partial
from typing import Any

import paddle
from paddle import nn
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.utils.sequence_parallel_utils import AllGatherOp, ReduceScatterOp
from paddlenlp.peft.lora.lora_layers import (
    ColumnParallelLoRALinear,
    ColumnSequenceParallelLoRALinear,
    LoRALinear,
    RowParallelLoRALinear,
    RowSequenceParallelLoRALinear,
)

from oarlock.families.shared import ROW_PARALLEL
from oarlock.peft.quantization import Quantization, QuantizedMatmul, QuantizedWeight
from oarlock.weights.layout import ParameterShard


def block_axis(name: str) -> int:
    """The axis of a weight [in, out] along which its blocks lie: the one that tensor parallelism does not split.

    Args:
        name: of the weight, or of its layer.
    """
    return 1 if name.removesuffix(".weight").rsplit(".", 1)[-1] in ROW_PARALLEL else 0


def quantize_base(model: nn.Layer, held: list[ParameterShard], how: Quantization) -> None:
    """Quantize every weight under LoRA when its values arrive (oarlock.weights.load), and compute with it.

    Args:
        held: the parameters of the model before LoRA was added.
    """
    names = {id(parameter.tensor): parameter for parameter in held}
    for layer in model.sublayers():
        if isinstance(layer, LoRALinear | _TENSOR_PARALLEL):
            parameter = names[id(layer.weight)]
            axis = block_axis(parameter.name)
            assert parameter.slice.axis in (None, 1 - axis), f"{parameter.name} is split along its blocks"
            layer.weight.when_filled = partial(_quantize, layer, axis, how)
            layer.forward = partial(_FORWARD[type(layer)], layer)


def _quantize(layer: Any, axis: int, how: Quantization) -> None:
    weight = layer._parameters.pop("weight")
    layer.base = QuantizedWeight(weight, axis, how)
    weight._clear_data()


def count_quantized_bytes(model: nn.Layer) -> tuple[int, int]:
    """Count the bytes of this rank's quantized weights, and what they would take in float32."""
    found = [layer.base for layer in model.sublayers() if isinstance(getattr(layer, "base", None), QuantizedWeight)]
    return sum(base.num_bytes for base in found), sum(4 * base.shape[0] * base.shape[1] for base in found)


# The forward of each of PaddleNLP's layers, with a product with the quantized base.


def _apply_a(layer: Any, x: paddle.Tensor) -> paddle.Tensor:
    return layer.lora_dropout(x) @ layer.lora_A


def _add_bias(layer: Any, y: paddle.Tensor) -> paddle.Tensor:
    return y if layer.bias is None else y + layer.bias


def _forward_plain(layer: Any, x: paddle.Tensor) -> paddle.Tensor:
    y = QuantizedMatmul.apply(x, layer.base)
    return _add_bias(layer, y + _apply_a(layer, x) @ layer.lora_B * layer.scaling)


def _forward_column(layer: Any, x: paddle.Tensor) -> paddle.Tensor:
    copy = partial(mp_ops._c_identity, group=layer.model_parallel_group)
    y = QuantizedMatmul.apply(copy(x), layer.base)
    y = _add_bias(layer, y + copy(_apply_a(layer, x)) @ layer.lora_B * layer.scaling)
    return mp_ops._c_concat(y, group=layer.model_parallel_group) if layer.gather_output and layer.is_mp else y


def _forward_row(layer: Any, x: paddle.Tensor) -> paddle.Tensor:
    group = layer.model_parallel_group
    x = x if layer.input_is_parallel else mp_ops._c_split(x, group=group)
    add = partial(mp_ops._mp_allreduce, group=group, use_calc_stream=True, use_model_parallel=True)
    y = add(QuantizedMatmul.apply(x, layer.base))
    return _add_bias(layer, y + add(_apply_a(layer, x)) @ layer.lora_B * layer.scaling)


def _forward_sequence_column(layer: Any, x: paddle.Tensor) -> paddle.Tensor:
    y = QuantizedMatmul.apply(AllGatherOp.apply(x), layer.base)
    return _add_bias(layer, y + AllGatherOp.apply(_apply_a(layer, x)) @ layer.lora_B * layer.scaling)


def _forward_sequence_row(layer: Any, x: paddle.Tensor) -> paddle.Tensor:
    y = ReduceScatterOp.apply(QuantizedMatmul.apply(x, layer.base))
    return _add_bias(layer, y + ReduceScatterOp.apply(_apply_a(layer, x)) @ layer.lora_B * layer.scaling)


_TENSOR_PARALLEL = (
    ColumnParallelLoRALinear | RowParallelLoRALinear | ColumnSequenceParallelLoRALinear | RowSequenceParallelLoRALinear
)
_FORWARD = {
    LoRALinear: _forward_plain,
    ColumnParallelLoRALinear: _forward_column,
    RowParallelLoRALinear: _forward_row,
    ColumnSequenceParallelLoRALinear: _forward_sequence_column,
    RowSequenceParallelLoRALinear: _forward_sequence_row,
}
