"""Arithmetic per token, and the share of the machine's peak that a run reaches (MFU)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from oarlock.parallel.family_rules import FAMILIES, ModelSizes


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
    sizes, family = ModelSizes.of(config), FAMILIES.get(config.model_type)
    attention = sizes.hidden * sizes.head_size * (2 * sizes.heads + 2 * sizes.kv_heads)
    feed_forward = sizes.hidden * sizes.intermediate * (3 if family is None or family.gated else 2)
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
