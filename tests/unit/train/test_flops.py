"""FLOPs of models and peaks of devices."""

from __future__ import annotations

import numpy as np
import pytest
from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM

from helpers import TINY_LLAMA
from oarlock.model_config.load import make_config
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


def test_of_the_experts_those_count_that_a_token_goes_to():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "mlp_only_layers": [0]}
    config = make_config({"model_type": "qwen3_moe"} | sizes | heads | experts, "config.json")
    attention, dense, mixture = 2 * 32 * 8 * (4 + 2), 3 * 32 * 64, 32 * 16 + 3 * 3 * 32 * 24
    found = compute_token_flops(config, 10)
    assert found.matmul_parameters == 2 * attention + dense + mixture + 32 * 128
    assert found.training == 6 * found.matmul_parameters + 12 * 2 * 4 * 8 * 10


def test_peaks_are_known_by_name():
    assert look_up_peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and look_up_peak_flops("NVIDIA H20") == 148e12
    assert look_up_peak_flops("NVIDIA H200") == 989e12 and look_up_peak_flops("Some New GPU") is None
