"""Answers in a batch are the answers alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from paddlenlp.transformers import AutoConfig

from oarlock.data.labels import Prompt
from oarlock.data.tokenizers import load_tokenizer
from oarlock.models.build import ModelSource, build_model
from oarlock.models.generate import generate_ids
from oarlock.parallel.plan import ParallelPlan
from oarlock.train.generation import Answer, generate_answers


@pytest.fixture(scope="module")
def loaded(tiny_model):
    model = build_model(ModelSource(tiny_model, AutoConfig.from_pretrained(str(tiny_model)), from_weights=True))
    model.eval()
    return model, load_tokenizer(str(tiny_model))


ROWS = [[5, 9, 30], [7], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50], [3, 300, 12, 14]]


def test_left_padded_batches_answer_as_one_at_a_time(loaded):
    model, tokenizer = loaded
    together = generate_ids(model, tokenizer, ROWS, 12)
    assert together == [generate_ids(model, tokenizer, [row], 12)[0] for row in ROWS]
    assert len({tuple(row) for row in together}) > 1


def test_answers_come_in_the_order_of_the_prompts(loaded):
    model, tokenizer = loaded
    prompts = [Prompt(row, f"prompt {i}", "x") for i, row in enumerate(ROWS)]
    trainer = SimpleNamespace(plan=ParallelPlan(), model=model, tokenizer=tokenizer)
    answers = generate_answers(trainer, prompts, max_new_tokens=6, batch_size=3)
    assert [answer.prompt.text for answer in answers] == [f"prompt {i}" for i in range(4)]
    alone = [tokenizer.decode(generate_ids(model, tokenizer, [row], 6)[0], skip_special_tokens=True) for row in ROWS]
    assert [answer.text for answer in answers] == alone


def test_exact_match_ignores_space_at_the_ends():
    prompt = Prompt([1], "q", "Paris")
    assert Answer(prompt, " Paris\n").right and not Answer(prompt, "paris").right
