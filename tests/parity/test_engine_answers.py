"""The engine's answers are those of models/generate, whatever else is in the batch."""

from __future__ import annotations

import pytest

from families import FAMILIES
from oarlock.data.templates import ChatTemplate
from oarlock.data.tokenizers import load_tokenizer
from oarlock.models.generate import generate_ids
from oarlock.serve.engine import Engine
from oarlock.serve.fused import FusedDecoder
from oarlock.serve.generic import GenericDecoder
from oarlock.serve.loading import Served
from oarlock.serve.requests import Answer, Limits, Prompt, Sampling
from test_generation import ROWS, TOKENIZER, stirred

OPEN, ANSWER = 1, 2
PROMPTS = [[*row, OPEN, ANSWER, row[0]] for row in ROWS]


def served(decoder, tokenizer, ends=(0,), adapters=()):
    return Served("tiny", decoder, tokenizer, ChatTemplate("x", "{{ messages[0]['content'] }}", {}), 256,
                  frozenset(ends), tuple(adapters))  # fmt: skip


def ask(engine, prompts, sampling, adapters=None):
    """Answers to all, asked at once."""
    answers = [Answer() for _ in prompts]
    tickets = [
        engine.submit(Prompt(token_ids=list(prompt), adapter=adapters[i] if adapters else None),
                      sampling[i] if isinstance(sampling, list) else sampling, answers[i].add)
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    assert all(ticket.wait(60) for ticket in tickets)
    return answers


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(str(tiny_tokenizer))


WAYS = [(family, "generic") for family in FAMILIES] + [(f, "fused") for f in ("llama", "qwen2", "mistral", "gemma")]


@pytest.mark.parametrize(("family", "way"), WAYS)
def test_answers_are_those_of_generate(family, way, tokenizer):
    model = stirred(family)
    wanted = [generate_ids(model, TOKENIZER, [row], 12)[0] for row in PROMPTS]
    decoder = GenericDecoder(model, {}) if way == "generic" else FusedDecoder(model, {}, 256)
    engine = Engine(served(decoder, tokenizer), Limits(max_batch=3))
    try:
        # four requests of different lengths for three places: the last one joins when another is done
        sampling = [Sampling(max_tokens=count) for count in (12, 3, 12, 7)]
        answers = ask(engine, PROMPTS, sampling)
        for answer, tokens, how in zip(answers, wanted, sampling, strict=True):
            assert answer.token_ids == tokens[: how.max_tokens], answer.error
            assert answer.finish_reason == ("length" if len(answer.token_ids) == how.max_tokens else "stop")
            assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    finally:
        engine.close()
