"""Models have the same logits, gradients and answers with and without the fused attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_packed_examples import PACKED, make_model, run

from oarlock.data.examples.collate import PackCollator
from oarlock.models.generate import generate_ids
from oarlock.ops import attention, install, library

pytestmark = [
    pytest.mark.usefixtures("paddles_own_ops"),
    pytest.mark.skipif(bool(library.why_missing()), reason=library.why_missing()),
]
NAMES = ("llama", "llama-grouped", "qwen2", "gemma")
TOKENIZER = SimpleNamespace(eos_token_id=0, pad_token_id=0, bos_token_id=0)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[Any, ...]]:
    """The arguments of every call of the operator."""
    found: list[tuple[Any, ...]] = []
    operator = attention.fused_attention
    monkeypatch.setattr(attention, "fused_attention", lambda *given: found.append(given) or operator(*given))
    return found


def make_batches() -> dict[str, dict[str, np.ndarray]]:
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
def test_logits_and_gradients(kind, calls):
    model = make_model(kind)
    expected = {name: run(model, arrays) for name, arrays in make_batches().items()}
    assert not calls
    install.use(True)
    for name, arrays in make_batches().items():
        calls.clear()
        logits, loss, gradients = run(model, arrays)
        assert len(calls) == 2, name  # one per layer
        query, key, _, ends, bias, *_ = calls[0]
        assert key.shape[2] == model.config.num_key_value_heads and query.shape[2] == 4
        assert (bias is not None) == (name == "a mask of its own") and (ends is None) == (
            bias is not None or name == "plain"
        )
        assert np.abs(logits - expected[name][0])[arrays["labels"] >= 0].max() <= 1e-5 * np.abs(logits).max()
        assert loss == pytest.approx(expected[name][1], rel=1e-6)
        for of, wanted in expected[name][2].items():
            assert np.abs(gradients[of] - wanted).max() <= 1e-5 * np.abs(wanted).max(), (name, of)


@pytest.mark.parametrize("granularity", ["full", "full_attn", "core_attn"])
def test_recompute(granularity, calls):
    arrays = make_batches()["packed"]
    expected = run(make_model("llama-grouped"), arrays)
    install.use(True)
    model = make_model("llama-grouped", recompute=True, recompute_granularity=granularity)
    model.train()
    model.recompute_enable()
    _, loss, gradients = run(model, arrays)
    assert len(calls) == 4
    assert loss == pytest.approx(expected[1], rel=1e-6)
    for of, wanted in expected[2].items():
        assert np.abs(gradients[of] - wanted).max() <= 1e-5 * np.abs(wanted).max(), of


@pytest.mark.parametrize("kind", NAMES)
def test_answers(kind, calls):
    """Prompts of several lengths, padded on the left, with a KV cache."""
    rows = [[5, 9, 30], [7], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50], [3, 90, 12, 14]]
    expected = generate_ids(make_model(kind), TOKENIZER, rows, 12)
    assert not calls
    install.use(True)
    assert generate_ids(make_model(kind), TOKENIZER, rows, 12) == expected
    assert {query.shape[1] for query, *_ in calls} >= {11, 1}


def test_dropout_uses_paddle(calls, capsys):
    install.use(True)
    model = make_model("llama-grouped", attention_dropout=0.1)
    model.train()
    run(model, make_batches()["plain"])
    assert not calls
    assert "attention with dropout uses Paddle's ops" in capsys.readouterr().out
    model.eval()
    run(model, make_batches()["plain"])
    assert len(calls) == 2
