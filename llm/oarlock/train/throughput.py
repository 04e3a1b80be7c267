"""Throughput of a run: tokens per second, FLOPs per token, the share of the device's peak (MFU), and memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import paddle

from oarlock.families.model_sizes import ModelSizes
from oarlock.families.registry import FAMILIES


@dataclass(frozen=True)
class TokenFlops:
    """Floating-point operations of one token's training step.

    Attributes:
        matmul_parameters: weights that a token is multiplied with: attention, feed-forward and the output head
            (tied or not); the embedding's look-up is no arithmetic.
        training: forward and backward, without recomputation.
        recomputed: what full recomputation adds (one more forward pass).
    """

    matmul_parameters: int
    training: float
    recomputed: float


def token_flops(config: Any, seq_length: int) -> TokenFlops:
    """FLOPs of a token in a sequence of seq_length, from the model's real shape (grouped heads, gated feed-forward).

    6 N + 12 L H Q T (PaLM, arXiv 2204.02311, appendix B) with N the matmul parameters, L layers, H query heads of
    size Q and T = seq_length. The attention term counts the full T x T scores, as PaLM does, although causal kernels
    do half of it: MFU figures published elsewhere use it so.

    Args:
        config: a PaddleNLP PretrainedConfig.
    """
    sizes, family = ModelSizes.from_config(config), FAMILIES.get(config.model_type)
    attention = sizes.hidden * sizes.head_size * (2 * sizes.heads + 2 * sizes.kv_heads)
    feed_forward = sizes.hidden * sizes.intermediate * (3 if family is None or family.gated_mlp else 2)
    parameters = sizes.num_layers * (attention + feed_forward) + sizes.hidden * sizes.vocab
    forward = 2 * parameters + 4 * sizes.num_layers * sizes.heads * sizes.head_size * seq_length
    return TokenFlops(parameters, 3.0 * forward, 1.0 * forward)


@cache
def _peaks() -> dict[str, Any]:
    return json.loads(resources.files("oarlock.train").joinpath("device_peaks.json").read_text(encoding="utf-8"))


def peak_flops(device_name: str) -> float | None:
    """Dense half-precision peak of a GPU in FLOP/s by its name ("NVIDIA A100-SXM4-80GB"), None when unknown."""
    words = device_name.upper().replace("-", " ").split()
    for name, entry in _peaks()["devices"].items():
        if name in words:
            return entry["tflops"] * 1e12
    return None


@dataclass
class Meter:
    """Counts the tokens of the steps since the last reading; time spent elsewhere can be left out.

    Attributes:
        flops: per token, or None where the family's shape is not known.
        devices: ranks that work together.
    """

    flops: TokenFlops | None
    devices: int
    peak: float | None
    _tokens: int = 0
    _started: float | None = None
    _left_out: float = 0.0

    def count(self, tokens: int) -> None:
        """Add the tokens of a step (all ranks together, padding not counted). The first call starts the clock."""
        if self._started is None:
            self._started, self._left_out = time.perf_counter(), 0.0
        self._tokens += tokens

    def leave_out(self, seconds: float) -> None:
        """Do not count time spent on evaluation or saving."""
        self._left_out += seconds

    def read(self) -> dict[str, float]:
        """Figures since the last reading."""
        now = time.perf_counter()
        started = now if self._started is None else self._started
        seconds = max(1e-9, now - started - self._left_out)
        rate = self._tokens / seconds
        self._tokens, self._started, self._left_out = 0, now, 0.0
        figures = {"tokens_per_second": rate, "tokens_per_second_per_device": rate / self.devices}
        if self.flops is not None:
            per_device = rate * self.flops.training / self.devices
            figures["tflops_per_device"] = per_device / 1e12
            if self.peak:
                figures["mfu"] = per_device / self.peak
        return figures | memory_figures()


def memory_figures() -> dict[str, float]:
    """Peak memory in GB (1e9 bytes): of this process, and of its GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    figures = {"memory_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if paddle.device.is_compiled_with_cuda() and paddle.device.get_device().startswith("gpu"):
        figures["gpu_memory_peak_gb"] = paddle.device.cuda.max_memory_allocated() / 1e9
        figures["gpu_memory_reserved_gb"] = paddle.device.cuda.max_memory_reserved() / 1e9
    return figures


def device_peak() -> float | None:
    """Peak FLOP/s of this process's device, None on a CPU or an unknown GPU."""
    if not paddle.device.get_device().startswith("gpu"):
        return None
    return peak_flops(paddle.device.cuda.get_device_name())
