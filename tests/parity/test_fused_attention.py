"""PaddleNLP's models have the same logits, gradients and answers with and without the fused attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import paddlenlp.transformers
import pytest
from test_packed_examples import MODELS, PACKED, SIZES, run

from oarlock.data.examples.collate import PackCollator
from oarlock.models import packing
from oarlock.models.generate import generate_ids
from oarlock.ops import attention, install, library

pytestmark = pytest.mark.skipif(bool(library.why_missing()), reason=library.why_missing())
NAMES = ("llama", "llama-grouped", "qwen2", "gemma")
TOKENIZER = SimpleNamespace(eos_token_id=0, pad_token_id=0, bos_token_id=0)


ATTENTION = [patch for patch in install.PATCHES if patch.replacement.startswith(f"{attention.__name__}:")]


@pytest.fixture
def fused(monkeypatch):
    """Install only the fused attention, and record the calls of the operator."""
    calls = []
    operator = attention.fused_attention

    def counted(*tensors: Any, **named: Any) -> Any:
        calls.append(tensors)
        return operator(*tensors, **named)

    monkeypatch.setattr(attention, "fused_attention", counted)
    monkeypatch.setattr(install, "PATCHES", ATTENTION)
    monkeypatch.setattr(install, "keep_freed_memory", lambda: None)
    install.uninstall()
    yield lambda: install.install() and calls
    install.uninstall()


def made(kind: str, **changes: Any) -> Any:
    name, of_kind = MODELS[kind]
    paddle.seed(11)
    found = getattr(paddlenlp.transformers, f"{name}ForCausalLM")(
        getattr(paddlenlp.transformers, f"{name}Config")(**(SIZES | of_kind | changes))
    )
    for parameter in found.parameters():
        if len(parameter.shape) == 2:
            parameter.set_value(paddle.randn(parameter.shape) * 0.2)
    packing.attend_in_blocks(found)
    return found


def batches() -> dict[str, dict[str, np.ndarray]]:
    random = np.random.default_rng(2)
    ids = random.integers(1, 96, (3, 40))
    labels = random.integers(0, 96, (3, 40))
    plain = {"input_ids": ids, "labels": labels}
    padded = np.ones((3, 40), np.int64)
    padded[1, 25:] = 0
    whole = np.tril(np.ones((3, 40, 40), bool)) & (random.random((3, 40, 40)) < 0.7) | np.eye(40, dtype=bool)
    return {
        "plain": plain,
        "padded on the right": plain | {"attention_mask": padded, "labels": np.where(padded, labels, -100)},
        "a mask of its own": plain | {"attention_mask": whole},
        "packed": PackCollator(96, 0, multiple_of=32)([PACKED[i] for i in range(len(PACKED))]),
    }


@pytest.mark.parametrize("kind", NAMES)
def test_logits_and_gradients(kind, fused):
    expected = {name: run(made(kind), arrays) for name, arrays in batches().items()}
    calls = fused()
    model = made(kind)
    for name, arrays in batches().items():
        calls.clear()
        logits, loss, gradients = run(model, arrays)
        assert len(calls) == 2, name  # one per layer
        query, key, _, ends, bias = calls[0]
        assert key.shape[2] == model.config.num_key_value_heads and query.shape[2] == 4
        dense = name == "a mask of its own" or (kind == "gemma" and name == "packed")
        assert (bias is not None) == dense and (ends is None) == dense
        assert np.abs(logits - expected[name][0])[arrays["labels"] >= 0].max() <= 1e-5 * np.abs(logits).max()
        assert loss == pytest.approx(expected[name][1], rel=1e-6)
        for of, wanted in expected[name][2].items():
            assert np.abs(gradients[of] - wanted).max() <= 1e-5 * np.abs(wanted).max(), (name, of)


@pytest.mark.parametrize("granularity", ["full", "full_attn", "core_attn"])
def test_recompute(granularity, fused):
    arrays = batches()["packed"]
    expected = run(made("llama-grouped"), arrays)
    calls = fused()
    model = made("llama-grouped", recompute=True, recompute_granularity=granularity)
    model.train()
    for layer in model.sublayers():
        if hasattr(layer, "enable_recompute"):
            layer.enable_recompute = True
    _, loss, gradients = run(model, arrays)
    assert len(calls) == 4
    assert loss == pytest.approx(expected[1], rel=1e-6)
    for of, wanted in expected[2].items():
        assert np.abs(gradients[of] - wanted).max() <= 1e-5 * np.abs(wanted).max(), of


@pytest.mark.parametrize("kind", NAMES)
def test_answers(kind, fused):
    """Prompts of several lengths, padded on the left, with a KV cache."""
    rows = [[5, 9, 30], [7], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50], [3, 90, 12, 14]]
    expected = generate_ids(made(kind), TOKENIZER, rows, 12)
    calls = fused()
    assert generate_ids(made(kind), TOKENIZER, rows, 12) == expected
    assert {query.shape[1] for query, *_ in calls} >= {11, 1}


def test_unsupported_inputs_use_paddle(fused, capsys):
    arrays = {name: paddle.to_tensor(array) for name, array in batches()["padded on the right"].items()}
    asked = {name: arrays[name] for name in ("input_ids", "attention_mask")} | {"output_attentions": True}
    expected = made("llama-grouped")(**asked)
    calls = fused()
    found = made("llama-grouped")(**asked)
    assert not calls
    assert "attention with attention weights as output uses Paddle's ops" in capsys.readouterr().out
    for one, other in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert float((one - other).abs().max()) <= 1e-6


def test_uninstall_restores_everything(fused):
    owners = [(patch.owners()[0], patch.name) for patch in ATTENTION]
    before = [getattr(owner, name) for owner, name in owners]
    fused()
    assert all(getattr(owner, name) is not old for (owner, name), old in zip(owners, before, strict=True))
    install.uninstall()
    assert all(getattr(owner, name) is old for (owner, name), old in zip(owners, before, strict=True))
