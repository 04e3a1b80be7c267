"""Throughput of a run: tokens per second, TFLOP/s, MFU, memory."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field

import paddle

from oarlock.train.flops import TokenFlops, peak_flops


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
    _started: float = field(default_factory=time.perf_counter)
    _left_out: float = 0.0

    def count(self, tokens: int) -> None:
        """Add the tokens of a step (all ranks together, padding not counted)."""
        self._tokens += tokens

    def leave_out(self, seconds: float) -> None:
        """Do not count time spent on evaluation or saving."""
        self._left_out += seconds

    def read(self) -> dict[str, float]:
        """Figures since the last reading."""
        now = time.perf_counter()
        seconds = max(1e-9, now - self._started - self._left_out)
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
