"""Throughput of a run: tokens per second, FLOPs per token, model FLOPs utilisation (MFU), and memory."""

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

from oarlock.families.architecture import Architecture, LatentAttention
from oarlock.families.decoder_weights import count_used_parameters
from oarlock.families.model_sizes import ModelSizes
from oarlock.families.registry import FAMILIES


@dataclass(frozen=True)
class TokenFlops:
    """Floating-point operations to train one token.

    Attributes:
        matmul_parameters: weights in matrix multiplications: attention, feed-forward and the output head (tied or
            not), but not the embedding.
        training: FLOPs of forward and backward, without recomputation.
        recomputed: additional FLOPs of full recomputation (one more forward pass).
    """

    matmul_parameters: int
    training: float
    recomputed: float


def compute_token_flops(config: Any, seq_length: int) -> TokenFlops:
    """Compute the FLOPs of a token in a sequence of seq_length, with grouped heads and gated feed-forward counted.

    The formula is 6 N + 12 L H Q T (PaLM, arXiv 2204.02311, appendix B) for N matmul parameters, L layers, H query
    heads of size Q, and T = seq_length. Like PaLM and published MFU numbers, it counts all T x T attention logits,
    although causal kernels compute only half of them. Of a sliding window it counts the window's.

    Args:
        config: a PaddleNLP PretrainedConfig.
    """
    sizes, family = ModelSizes.from_config(config), FAMILIES.get(config.model_type)
    if family is not None and family.decoder is not None:
        return _count_decoder_flops(family.decoder(config), seq_length)
    attention = sizes.hidden * sizes.head_size * (2 * sizes.heads + 2 * sizes.kv_heads)
    feed_forward = sizes.hidden * sizes.intermediate * (3 if family is None or family.gated_mlp else 2)
    parameters = sizes.num_layers * (attention + feed_forward) + sizes.hidden * sizes.vocab
    forward = 2 * parameters + 4 * sizes.num_layers * sizes.heads * sizes.head_size * seq_length
    return TokenFlops(parameters, 3.0 * forward, 1.0 * forward)


def _count_decoder_flops(model: Architecture, seq_length: int) -> TokenFlops:
    """Compute them with the parameters that a token uses (of experts, top_k of each layer), and with windows."""
    parameters, scores = count_used_parameters(model), 0
    for attention in (block.attention for block in model.blocks):
        if isinstance(attention, LatentAttention):
            scores += attention.heads * (attention.nope_dim + attention.rope_dim + attention.value_dim) * seq_length
        else:
            scores += attention.heads * 2 * attention.head_dim * min(seq_length, attention.window or seq_length)
    forward = 2 * parameters + 2 * scores
    return TokenFlops(parameters, 3.0 * forward, 1.0 * forward)


@cache
def look_up_peak_flops(device_name: str) -> float | None:
    """Look up a GPU's dense half-precision peak in FLOP/s by name ("NVIDIA A100-SXM4-80GB"); None if unknown."""
    words = device_name.upper().replace("-", " ").split()
    text = resources.files("oarlock.train").joinpath("device_peaks.json").read_text(encoding="utf-8")
    for name, entry in json.loads(text)["devices"].items():
        if name in words:
            return entry["tflops"] * 1e12
    return None


@dataclass
class Meter:
    """Measures the throughput since the last reading. Time for other work can be excluded.

    Attributes:
        flops: FLOPs per token; None if they are not known for the family.
        devices: number of ranks.
        peak: peak FLOP/s of a device, if known.
    """

    flops: TokenFlops | None
    devices: int
    peak: float | None
    _tokens: int = 0
    _started: float | None = None
    _excluded: float = 0.0

    def count(self, tokens: int) -> None:
        """Add the tokens of a step: of all ranks, without padding. The first call starts the clock."""
        if self._started is None:
            self._started, self._excluded = time.perf_counter(), 0.0
        self._tokens += tokens

    def exclude(self, seconds: float) -> None:
        """Exclude time spent on evaluation or saving."""
        self._excluded += seconds

    def read(self) -> dict[str, float]:
        """Metrics since the last reading, and peak memory in GB (1e9 bytes) of this process and its GPU."""
        now = time.perf_counter()
        started = now if self._started is None else self._started
        seconds = max(1e-9, now - started - self._excluded)
        rate = self._tokens / seconds
        self._tokens, self._started, self._excluded = 0, now, 0.0
        metrics = {"tokens_per_second": rate, "tokens_per_second_per_device": rate / self.devices}
        if self.flops is not None:
            per_device = rate * self.flops.training / self.devices
            metrics["tflops_per_device"] = per_device / 1e12
            if self.peak:
                metrics["mfu"] = per_device / self.peak
        unit = 1 if sys.platform == "darwin" else 1024
        metrics["memory_peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
        if paddle.device.is_compiled_with_cuda() and paddle.device.get_device().startswith("gpu"):
            metrics["gpu_memory_peak_gb"] = paddle.device.cuda.max_memory_allocated() / 1e9
            metrics["gpu_memory_reserved_gb"] = paddle.device.cuda.max_memory_reserved() / 1e9
        return metrics


def find_device_peak() -> float | None:
    """Look up the peak FLOP/s of this process's device; None for a CPU or an unknown GPU."""
    if not paddle.device.get_device().startswith("gpu"):
        return None
    return look_up_peak_flops(paddle.device.cuda.get_device_name())
