"""A frozen base in 4 bits (QLoRA, arXiv 2305.14314): NormalFloat4 and FP4 in blocks, with double quantization.

PaddleNLP's layers need a package of GPU kernels that no public index has. Here the arithmetic is in Paddle ops for
every device. The kernel is used where it is installed and returns the same values.

Blocks lie along the axis of a weight that tensor parallelism does not split, so every plan rounds to the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import paddle
from paddle.autograd import PyLayer

from oarlock.environment.console import log_once

# The 16 values of each type by code: NF4 from table 5 (appendix E) of the paper, FP4 as in bitsandbytes (sign,
# 2 exponent bits, 1 mantissa bit, scaled to 1).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0052083333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
FP4 = (*_FP4, *(-value for value in _FP4))
TABLES = {"nf4": NF4, "fp4": FP4}
_CHUNK = 1 << 22  # elements quantized at a time


@dataclass(frozen=True)
class Quantization:
    """Settings of a quantization.

    Attributes:
        algorithm: "nf4" or "fp4".
        block_size: number of weights that share a scale.
        double: quantize the scales to 8 bits.
        double_block_size: number of scales that share a scale.
    """

    algorithm: str = "nf4"
    block_size: int = 64
    double: bool = True
    double_block_size: int = 256

    def round_trip(self, weight: np.ndarray, axis: int) -> np.ndarray:
        """Quantize and dequantize a weight: the base that an adapter is trained on.

        Args:
            axis: along which the blocks lie.
        """
        return QuantizedWeight(paddle.to_tensor(np.asarray(weight, np.float32)), axis, self).value().numpy()


@cache
def make_dynamic_table() -> np.ndarray:
    """256 values from -1 to 1 whose precision follows their magnitude ("dynamic tree", arXiv 2110.02861, section 1.3).

    A sign, zeros that count the exponent (of ten), a one, and the rest of the 7 bits as a fraction between 0.1 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        magnitudes = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [*magnitudes, *-magnitudes]
    return np.sort(np.array(values, np.float32))


class QuantizedWeight:
    """A matrix in 4 bits, [in, out].

    Its rows lie along the axis that may be split, its columns along the one in which blocks lie.

    Attributes:
        codes: uint8 [rows, half of the columns], two codes per byte, the first one in the upper half.
        scales: of the blocks, [rows, blocks]: float32, or uint8 codes of the dynamic table.
    """

    def __init__(self, weight: paddle.Tensor, axis: int, how: Quantization) -> None:
        self.shape, self.axis, self.how = tuple(weight.shape), axis, how
        self.columns = self.shape[axis]
        rows = self.shape[1 - axis]
        step = max(1, _CHUNK // self.columns)
        with paddle.no_grad():
            parts = []
            for i in range(0, rows, step):
                end = min(i + step, rows)
                parts.append(self._quantize(weight[:, i:end].transpose([1, 0]) if axis == 0 else weight[i:end]))
            self.codes = paddle.concat([codes for codes, _ in parts])
            scales = paddle.concat([scales for _, scales in parts])
            self.offset = self.double_scales = None
            if how.double:  # the scales minus the mean of their row, in 8 bits
                self.offset = scales.mean(axis=1, keepdim=True)
                groups = _pad_columns(scales - self.offset, how.double_block_size)
                groups = groups.reshape([rows, -1, how.double_block_size])
                self.double_scales = groups.abs().max(axis=-1)
                unit = groups / paddle.clip(self.double_scales, min=1e-30).unsqueeze(-1)
                table = make_dynamic_table()
                edges = paddle.to_tensor((table[:-1] + table[1:]) / 2)
                scales = paddle.bucketize(unit, edges).reshape([rows, -1])[:, : scales.shape[1]].astype("uint8")
            self.scales = scales

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        tensors = (self.codes, self.scales, self.offset, self.double_scales)
        return sum(tensor._numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def value(self, dtype: str | paddle.dtype = "float32") -> paddle.Tensor:
        """The dequantized matrix, [in, out]."""
        with paddle.no_grad():
            rows = self._dequantize_rows().astype(dtype)
            return rows.transpose([1, 0]) if self.axis == 0 else rows

    def _quantize(self, rows: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        count, size = rows.shape[0], self.how.block_size
        blocks = _pad_columns(rows.astype("float32"), size).reshape([count, -1, size])
        scales = blocks.abs().max(axis=-1)
        unit = blocks / paddle.clip(scales, min=1e-30).unsqueeze(-1)
        order, edges = _order_codes(self.how.algorithm)
        codes = paddle.gather(
            paddle.to_tensor(order.astype(np.int64)), paddle.bucketize(unit, paddle.to_tensor(edges)).flatten()
        )
        codes = codes.reshape([count, -1])[:, : self.columns + self.columns % 2]
        if codes.shape[1] % 2:
            codes = paddle.concat([codes, paddle.zeros([count, 1], codes.dtype)], axis=1)
        return (codes[:, ::2] * 16 + codes[:, 1::2]).astype("uint8"), scales

    def _dequantize_rows(self) -> paddle.Tensor:
        scales, size = self.scales, self.how.block_size
        if self.double_scales is not None:
            unit = paddle.gather(paddle.to_tensor(make_dynamic_table()), scales.astype("int64").flatten())
            wide = self.double_scales.repeat_interleave(self.how.double_block_size, axis=1)[:, : scales.shape[1]]
            scales = unit.reshape(scales.shape) * wide + self.offset
        kernel = _find_kernel(self.how.algorithm) if self.columns % size == 0 else None
        if kernel is not None:
            return kernel(self.codes, scales, size).reshape([-1, self.columns])
        pairs = paddle.nn.functional.embedding(self.codes.astype("int32"), _make_pairs(self.how.algorithm))
        unit = pairs.reshape([self.codes.shape[0], -1])[:, : self.columns]
        return unit * scales.repeat_interleave(size, axis=1)[:, : self.columns]


def _pad_columns(rows: paddle.Tensor, multiple: int) -> paddle.Tensor:
    missing = -rows.shape[1] % multiple
    return paddle.concat([rows, paddle.zeros([rows.shape[0], missing], rows.dtype)], axis=1) if missing else rows


@cache
def _order_codes(algorithm: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes in the order of their values, and the edges between neighbours."""
    table = np.array(TABLES[algorithm], np.float32)
    order = np.argsort(table, kind="stable")
    ordered = table[order]
    return order, (ordered[:-1] + ordered[1:]) / 2


def _make_pairs(algorithm: str) -> paddle.Tensor:
    """The two values of each byte, [256, 2]."""
    table = np.array(TABLES[algorithm], np.float32)
    codes = np.arange(256)
    return paddle.to_tensor(np.stack([table[codes >> 4], table[codes & 15]], axis=1))


@cache
def _find_kernel(algorithm: str) -> Callable[[paddle.Tensor, paddle.Tensor, int], paddle.Tensor] | None:
    """paddleslim_ops' kernel, if it is installed, there is a GPU, and its values are those of the table."""
    if not paddle.device.get_device().startswith("gpu"):
        return None
    try:
        from paddleslim_ops import dequant_blockwise
    except ImportError:
        log_once("QLoRA: paddleslim_ops is not installed; Paddle ops dequantize the weights, which is slower")
        return None

    def unpack(codes: paddle.Tensor, scales: paddle.Tensor, block_size: int) -> paddle.Tensor:
        flat = codes.reshape([-1, 1])
        return dequant_blockwise(flat, None, scales.flatten(), blocksize=block_size, quant_type=algorithm)

    codes = paddle.arange(256, dtype="int32").astype("uint8").reshape([1, -1])
    found = unpack(codes, paddle.ones([1, 8]), 64).flatten().astype("float32")
    if found.shape != [512] or not bool(paddle.allclose(found, _make_pairs(algorithm).flatten(), atol=1e-3)):
        log_once("QLoRA: paddleslim_ops returns other values than the published table; Paddle ops are used instead")
        return None
    return unpack


class QuantizedMatmul(PyLayer):
    """x [..., in] times a quantized weight. It is dequantized again for the gradient of x instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, weight: QuantizedWeight) -> paddle.Tensor:
        """Return [..., out]."""
        ctx.weight = weight
        return paddle.matmul(x, weight.value(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> paddle.Tensor:
        """Return the gradient of x."""
        return paddle.matmul(gradient, ctx.weight.value(gradient.dtype), transpose_y=True)
