"""What a text gives in a batch, packed, or in parts is what it gives alone: beyond windows and longrope's length."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from oarlock.data.examples.collate import FinetuneCollator, PackCollator
from oarlock.data.examples.labels import Example
from oarlock.model_config.load import find_model_class, make_config
from support.tiny_configs import TINY_CONFIGS

LENGTHS = (80, 3, 17, 70)  # windows are 6, and longrope's short factors are for 64
_DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}
CONFIGS = TINY_CONFIGS | {"dynamic": TINY_CONFIGS["llama"] | _DYNAMIC}


@pytest.fixture(params=CONFIGS)
def given(request):
    config = make_config(CONFIGS[request.param], "x")
    paddle.seed(1)
    model = find_model_class(config)(config)
    model.eval()
    random = np.random.default_rng(2)
    texts = [random.integers(1, 512, length) for length in LENGTHS]
    with paddle.no_grad():
        alone = [model(paddle.to_tensor(text[None])).numpy()[0] for text in texts]
        yield SimpleNamespace(name=request.param, model=model, texts=texts, alone=alone)


def run(model, arrays):
    inputs = {name: paddle.to_tensor(value) for name, value in arrays.items() if name not in ("labels", "num_tokens")}
    return model(**inputs).numpy()


def test_padded_rows(given):
    examples = [Example(text.tolist(), text.tolist(), 0) for text in given.texts]
    found = run(given.model, FinetuneCollator(512, 0, with_positions=given.name in ("phi3", "dynamic"))(examples))
    longest = max(LENGTHS)
    left = {
        name: np.zeros((len(LENGTHS), longest), np.int64) for name in ("input_ids", "attention_mask", "position_ids")
    }
    for row, text in enumerate(given.texts):
        for name, value in zip(left, (text, 1, np.arange(len(text))), strict=True):
            left[name][row, longest - len(text) :] = value
    padded_left = run(given.model, left)
    for row, wanted in enumerate(given.alone):
        np.testing.assert_allclose(found[row, : len(wanted)], wanted, atol=1e-4)
        np.testing.assert_allclose(padded_left[row, -len(wanted) :], wanted, atol=1e-4)


def test_packed_rows(given):
    examples = tuple(Example(text.tolist(), text.tolist(), 0) for text in given.texts)
    packs = [examples, examples[1:3]]
    found = run(given.model, PackCollator(512, 0)(packs))
    for row, wanted in enumerate((given.alone, given.alone[1:3])):
        parts = np.concatenate(wanted)
        np.testing.assert_allclose(found[row, : len(parts)], parts, atol=1e-4)


def test_parts_with_a_cache(given):
    # Beyond its 16 positions, dynamic scaling leaves the frequencies of earlier keys as they are, as transformers does.
    stops = (9, 10, 16) if given.name == "dynamic" else (9, 10, 31, 60)
    past, found = None, []
    for start, stop in zip((0, *stops), stops, strict=False):
        part = paddle.to_tensor(given.texts[0][None, start:stop])
        logits, past = given.model(part, use_cache=True, past_key_values=past)
        found.append(logits.numpy()[0])
    whole = given.model(paddle.to_tensor(given.texts[0][None, : stops[-1]])).numpy()[0]
    np.testing.assert_allclose(np.concatenate(found), whole, atol=1e-4)
