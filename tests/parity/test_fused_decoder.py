"""Logits of the fused decoder compared with the model's forward, and inputs that its operator refuses."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from families import family_model
from oarlock.model_config.load import find_model_class, make_config
from oarlock.models.construct import construct
from oarlock.ops import library
from oarlock.ops.decoder import (
    DecoderSizes,
    DecoderWeights,
    decoder_pass,
    pack_adapter,
    pack_layer,
    pack_panels,
)
from oarlock.serve.engine.decoder import Feed
from oarlock.serve.engine.fused_decoder import FusedDecoder, explain_not_fused
from support.tiny_configs import TINY_CONFIGS

VARIANTS = {
    "llama": ("llama", {}),
    "llama, heads of 12, linear scaling": (
        "llama",
        {"hidden_size": 48, "intermediate_size": 100, "rope_scaling_type": "linear", "rope_scaling_factor": 2.0},
    ),
    "qwen2, tied, one key head": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1, "vocab_size": 517}),
    "mistral, heads of 64": ("mistral", {"hidden_size": 256, "intermediate_size": 160}),
    "gemma": ("gemma", {"head_dim": 24}),
    "gemma, approximate": ("gemma", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama, merged layers": ("llama", {"fuse_attention_qkv": True, "fuse_attention_ffn": True}),
}
NEWER = [name for name in TINY_CONFIGS if name not in ("llama", "qwen2", "mistral", "gemma")]


def make_variant(variant: str) -> Any:
    """The model of a variant: of VARIANTS, or a tiny configuration of transformers."""
    if variant in VARIANTS:
        family, changes = VARIANTS[variant]
        return family_model(family, **changes)
    config = make_config({"transformers_version": "5.0.0", **TINY_CONFIGS[variant]}, variant)
    return construct(find_model_class(config), config, "float32")


def compute_difference(variant: str) -> float:
    """Largest difference over all logits of three texts, read in parts, relative to the largest logit."""
    model = make_variant(variant)
    model.eval()
    random = np.random.default_rng(1)
    for parameter in model.parameters():
        noise = random.normal(0, 0.2 if parameter.ndim > 1 else 0.3, parameter.shape).astype("float32")
        parameter.set_value(parameter + paddle.to_tensor(noise))
    rows = [random.integers(0, model.config.vocab_size, length).tolist() for length in (130, 3, 47)]
    wanted = []
    for row in rows:
        with paddle.no_grad():
            outputs = model(input_ids=paddle.to_tensor([row]))
        wanted.append((outputs if isinstance(outputs, paddle.Tensor) else outputs[0])[0].numpy())
    decoder = FusedDecoder(model, {}, 256)
    sequences = [decoder.start(len(row), None) for row in rows]
    decoder.feed([Feed(s, row[: len(row) // 2], wants_logits=False) for s, row in zip(sequences, rows, strict=True)])
    worst = 0.0
    for place in range(65, 130):
        going = [i for i, row in enumerate(rows) if len(row) // 2 + place - 65 < len(row)]
        at = [len(rows[i]) // 2 + place - 65 for i in going]
        found = decoder.feed([Feed(sequences[i], rows[i][p : p + 1]) for i, p in zip(going, at, strict=True)])
        for row, i, p in zip(found, going, at, strict=True):
            worst = max(worst, float(np.abs(row - wanted[i][p]).max() / np.abs(wanted[i]).max()))
    return worst


@pytest.mark.parametrize("variant", [*VARIANTS, *NEWER])
def test_logits_equal_the_model(variant):
    if reason := explain_not_fused(make_variant(variant)):
        assert reason in {"it is a mixture of experts", "its rotary positions depend on the length"}
        assert variant in {"mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "phi3"}
    else:
        assert compute_difference(variant) < 5e-5


@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_lower_instruction_sets(isa):
    code = (
        "from oarlock.environment.paddle_import import import_paddle; import_paddle(1); import test_fused_decoder as t; "
        "print(max(t.compute_difference(v) for v in ('llama', 'gemma, approximate', 'gemma2', 'olmo2', 'glm4')))"
    )
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here), str(here.parent), str(here.parents[1] / "llm")])
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OARLOCK_ISA": isa, "PYTHONPATH": paths}, check=False,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) < 5e-5


SIZES = DecoderSizes(8, 16, 1, 2, 1, 4, 10, 1e-6)


def call(tokens=(1, 2), runs=((0, 2, 0, 16, -1, 1),), cache=None, adapters=None, sizes=SIZES, layer=None):
    ones = np.ones
    if layer is None:
        layer = pack_layer([ones(8), ones(8), ones(16)], [ones([8, 16]), ones([8, 8]), ones([8, 32]), ones([16, 8])])
    shared = [ones([10, 8]), ones(8), pack_panels(ones([8, 10])), ones([32, 4]), ones([32, 4])]
    packed = adapters or [pack_adapter(2, [{"q_proj": (ones([8, 2]), ones([2, 8]))}])]
    weights = DecoderWeights(
        [paddle.to_tensor(part, "float32").reshape([-1]) for part in shared],
        [paddle.to_tensor(layer)],
        [paddle.to_tensor(values) for values, _ in packed],
        [paddle.to_tensor(plan) for _, plan in packed],
    )
    caches = [paddle.zeros([sizes.cache_size(16)]) if cache is None else cache for _ in runs]
    return decoder_pass(sizes, weights, paddle.to_tensor(np.array(tokens)), paddle.to_tensor(np.array(runs)), caches)


def test_a_step_leaks_no_objects():
    """A server makes millions of steps, and paddle.to_tensor leaks an object per call."""
    decoder = FusedDecoder(family_model("llama"), {}, 256)
    sequence = decoder.start(200, None)

    def steps(count):
        for _ in range(count):
            decoder.feed([Feed(sequence, [5])])
        gc.collect()
        return len(gc.get_objects())

    before = steps(50)
    assert steps(100) < before + 50


def test_unsupported_inputs_are_refused():
    assert call().shape == [1, 10]
    assert call(runs=((0, 2, 0, 16, 0, 0), (0, 1, 3, 16, -1, 1))).shape == [1, 10]
    for wrong, message in [
        ({"tokens": (1, 10)}, "token 10 is not in the vocabulary"),
        ({"runs": ((0, 3, 0, 16, -1, 1),)}, "not among the tokens"),
        ({"runs": ((0, 2, 15, 16, -1, 1),)}, "does not fit its capacity"),
        ({"runs": ((0, 2, 0, 17, -1, 1),)}, "does not fit its capacity"),
        ({"runs": ((0, 2, 0, 32, -1, 1),)}, "a cache has to be"),
        ({"runs": ((0, 2, 31, 48, -1, 1),)}, "only 32 positions"),
        ({"runs": ((0, 2, 0, 16, 1, 1),)}, "no adapter 1"),
        ({"layer": np.zeros(64, np.float32)}, "too small"),
        ({"layer": np.zeros(4096, np.float32)}, "too large"),
        ({"adapters": [(np.zeros(8, np.float32), np.ones(8, np.int64))]}, "too small"),
        ({"cache": paddle.zeros([7])}, "a cache has to be"),
        ({"sizes": replace(SIZES, windows=(-1,))}, "no such window"),
        ({"sizes": replace(SIZES, tables=(1,))}, "no such window or table"),
        ({"sizes": replace(SIZES, rotary_dim=6)}, "has to be even and within it"),
        ({"sizes": replace(SIZES, qk_norm="head")}, "too small"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**wrong)
    assert library.why_missing() == ""
