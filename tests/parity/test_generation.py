"""Batched answers equal single answers in every family, and equal greedy decoding with the training forward."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import AutoConfig

from families import FAMILIES, family_model
from oarlock.data.examples.labels import EvalPrompt
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.models.build import ModelSource, build_model
from oarlock.models.generate import generate_ids, generate_without_cache, pad_right, select_last_logits
from oarlock.train.evaluation.generation import generate_answers
from oarlock.train.evaluation.prompts import Answer, PromptSet

TOKENIZER = SimpleNamespace(eos_token_id=0, pad_token_id=0, bos_token_id=0)
ROWS = [[5, 9, 30], [7], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50], [3, 300, 12, 14]]
OPEN, ANSWER = 1, 2  # see families.py


def make_sensitive_model(family: str):
    """A model whose answers depend on the whole prompt.

    (Fresh layers are so weak compared with the embeddings that tied models repeat their last token whatever precedes it.)
    """
    model = family_model(family)
    random = np.random.default_rng(5)
    for name, parameter in model.named_parameters():
        if "embed" not in name and "wte" not in name and "lm_head" not in name:
            scale = 0.6 if len(parameter.shape) > 1 else 0.3
            parameter.set_value(
                parameter + paddle.to_tensor(random.normal(0, scale, parameter.shape).astype("float32"))
            )
    model.eval()
    return model


def predict_next_ids(model, rows: list[list[int]]) -> list[int]:
    """The most likely ids from a full forward pass without a cache."""
    ids, lengths = pad_right(rows, 0)
    with paddle.no_grad():
        outputs = model(input_ids=paddle.to_tensor(ids))
    scores = outputs if isinstance(outputs, paddle.Tensor) else outputs[0]
    return select_last_logits(scores, lengths).argmax(axis=-1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_answers_equal_single_answers(family):
    model = make_sensitive_model(family)
    rows = [[*row, OPEN, ANSWER, row[0]] for row in ROWS]
    together = generate_ids(model, TOKENIZER, rows, 8)
    assert together == [generate_ids(model, TOKENIZER, [row], 8)[0] for row in rows]
    # ... which equal the forward of training, token by token
    assert together == generate_without_cache(partial(predict_next_ids, model), rows, (0,), 8)
    assert len({tuple(row) for row in together}) == 4 and max(len(set(row)) for row in together) > 2
    without_first = generate_ids(model, TOKENIZER, [row[1:] for row in rows], 8)
    assert together != without_first, "the first tokens have no say"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_attends_to_later_tokens(family):
    """In the training forward: changing the last token leaves all earlier logits unchanged."""
    model = make_sensitive_model(family)
    ids = np.array([[5, 9, OPEN, ANSWER, 30, 40], [7, OPEN, ANSWER, 8, 6, 5]])
    other = ids.copy()
    other[:, -1] = 77
    scores = []
    for rows in (ids, other):
        outputs = model(input_ids=paddle.to_tensor(rows))
        scores.append((outputs if isinstance(outputs, paddle.Tensor) else outputs[0]).numpy())
    np.testing.assert_allclose(scores[0][:, :-1], scores[1][:, :-1], rtol=1e-5, atol=1e-5)
    assert not np.allclose(scores[0][:, -1], scores[1][:, -1])


def test_answers_are_in_the_order_of_the_prompts(tiny_model):
    model = build_model(ModelSource(tiny_model, AutoConfig.from_pretrained(str(tiny_model)), from_weights=True))
    model.eval()
    tokenizer = load_tokenizer(str(tiny_model))
    prompts = [EvalPrompt(row, f"prompt {i}", "x") for i, row in enumerate(ROWS)]
    answers = generate_answers(PromptSet(prompts, max_new_tokens=6, batch_size=3), model, tokenizer)
    assert [answer.prompt.text for answer in answers] == [f"prompt {i}" for i in range(4)]
    alone = [tokenizer.decode(generate_ids(model, tokenizer, [row], 6)[0], skip_special_tokens=True) for row in ROWS]
    assert [answer.text for answer in answers] == alone


def test_rows_of_the_samples_file():
    assert Answer(EvalPrompt([1], "q", "Paris"), "Rome").row() == {"prompt": "q", "answer": "Rome", "expected": "Paris"}
    assert Answer(EvalPrompt([1], "q", "", "f.txt:2"), "x").row() == {"source": "f.txt:2", "prompt": "q", "answer": "x"}
