"""The frequencies of rotary embeddings, and the ways to scale them for longer texts."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle

from oarlock.families.architecture import Rope
from oarlock.families.rope import LENGTH


@paddle.jit.not_to_static
def compute_frequencies(rope: Rope, length: int) -> tuple[np.ndarray, float]:
    """Compute the inverse frequencies, and the factor of cos and sin.

    - default: theta ** (-2i / dim) (RoFormer, https://arxiv.org/abs/2104.09864, section 3.2.2).
    - linear: these divided by factor (position interpolation, https://arxiv.org/abs/2306.15595, also by kaiokendev).
    - ntk: the base is theta * factor ** (dim / (dim - 2)) (bloc97, "NTK-aware scaled RoPE"; PaddleNLP's
      LlamaNTKScalingRotaryEmbedding).
    - dynamic: like ntk for texts longer than max_positions, with factor * length / max_positions - (factor - 1) as the
      factor (emozilla, "Dynamically scaled RoPE"; transformers' _compute_dynamic_ntk_parameters).
    - yarn: https://arxiv.org/abs/2309.00071, sections 3.2 to 3.4.
    - llama3: apply_scaling of https://github.com/meta-llama/llama-models.
    - longrope: every frequency is divided by a number of its own, from one list for texts up to
      original_max_position_embeddings and another for longer ones (https://arxiv.org/abs/2402.13753, section 3).

    Args:
        length: largest position of the text + 1. Only dynamic and longrope depend on it.

    Returns:
        float32 [dim / 2], and the factor, which is 1 except for yarn and longrope.
    """
    scaling, base, original = rope.scaling, rope.theta, get_original_length(rope)
    if rope.kind == "ntk" or (rope.kind == "dynamic" and length > original):
        factor = scaling["factor"]
        if rope.kind == "dynamic":
            factor = factor * length / original - (factor - 1)
        base = base * factor ** (rope.dim / (rope.dim - 2))
    powers = _compute_powers(base, rope.dim)
    if rope.kind == "yarn":
        return _scale_yarn(rope, powers)
    if rope.kind == "longrope":
        factors = np.asarray(scaling["long_factor" if length > original else "short_factor"], np.float32)
        factor = scaling.get("factor", rope.max_positions / original)
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return np.float32(1) / (factors * powers), float(scaling.get("attention_factor", attention))
    inverse = np.float32(1) / powers
    if rope.kind == "linear":
        inverse = inverse / np.float32(scaling["factor"])
    elif rope.kind == "llama3":
        inverse = _scale_llama3(scaling, inverse)
    return inverse, 1.0


def get_original_length(rope: Rope) -> int:
    """Tokens of the longest texts that the model was trained with before its rotary embedding was scaled."""
    return rope.scaling.get(LENGTH, rope.max_positions)


@functools.lru_cache(maxsize=64)
def _compute_powers(base: float, dim: int) -> np.ndarray:
    """base ** (2i / dim), float32 [dim / 2], as Paddle rounds it on a CPU (NumPy rounds differently)."""
    with paddle.base.dygraph.guard(paddle.CPUPlace()):  # even while a static graph is built
        return (base ** (paddle.arange(0, dim, 2).astype("float32") / dim)).numpy()


def _scale_llama3(scaling: Mapping[str, Any], inverse: np.ndarray) -> np.ndarray:
    """Divide low frequencies by factor, keep high ones, and blend those between."""
    original, factor = np.float32(scaling[LENGTH]), np.float32(scaling["factor"])
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = np.float32(2 * math.pi) / inverse
    smooth = (original / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    is_high, is_low = wavelength < original / np.float32(high), wavelength > original / np.float32(low)
    return np.select([is_high, is_low], [inverse, inverse / factor], blended)


def _scale_yarn(rope: Rope, powers: np.ndarray) -> tuple[np.ndarray, float]:
    """Divide low frequencies by factor, keep high ones, and blend those between along a ramp over the components.

    With mscale and mscale_all_dim, the attention factor is the quotient of two (DeepSeek). Without truncate, the ends
    of the ramp are not rounded (gpt-oss).
    """
    scaling, original = rope.scaling, get_original_length(rope)
    factor = scaling["factor"]

    def find_component(rotations: float) -> float:
        """The component that makes this many rotations over the original length (equation 17)."""
        return rope.dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    start, end = find_component(scaling.get("beta_fast", 32)), find_component(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, rope.dim - 1)
    ramp = (np.arange(rope.dim // 2, dtype=np.float32) - np.float32(start)) / np.float32(end - start or 0.001)
    kept = 1 - np.clip(ramp, 0, 1)  # share of the unscaled frequency
    inverse = 1 / (np.float32(factor) * powers) * (1 - kept) + 1 / powers * kept

    def find_attention_factor(scale: float) -> float:
        """The square root of 1 / t (equation 22)."""
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if "attention_factor" in scaling:
        return inverse, float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return inverse, find_attention_factor(scaling["mscale"]) / find_attention_factor(scaling["mscale_all_dim"])
    return inverse, find_attention_factor(1)
