"""FLOPs of models and peaks of devices."""

from __future__ import annotations

import numpy as np
import pytest
from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM

from helpers import TINY_LLAMA
from oarlock.train.throughput import compute_token_flops, look_up_peak_flops

# flops


def test_flops_count_the_matrices_of_the_model():
    config = LlamaConfig(**TINY_LLAMA)
    model = LlamaForCausalLM(config)
    matrices = sum(int(np.prod(p.shape)) for n, p in model.named_parameters() if len(p.shape) == 2 and "embed" not in n)
    found = compute_token_flops(config, 64)
    assert found.matmul_parameters == matrices
    assert found.training == 6 * matrices + 12 * 2 * 4 * 8 * 64
    assert found.recomputed == pytest.approx(found.training / 3)


def test_peaks_are_known_by_name():
    assert look_up_peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and look_up_peak_flops("NVIDIA H20") == 148e12
    assert look_up_peak_flops("NVIDIA H200") == 989e12 and look_up_peak_flops("Some New GPU") is None
