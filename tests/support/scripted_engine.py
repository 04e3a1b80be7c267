"""An engine around a scripted decoder and a tokenizer of letters."""

from __future__ import annotations

import threading
from types import MappingProxyType

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from oarlock.data.templates.chat_template import ChatTemplate
from oarlock.sampling.params import SamplingParams
from oarlock.serve.config import EngineConfig
from oarlock.serve.engine.engine import Engine
from oarlock.serve.engine.loading import ServedModel, find_special_tokens
from oarlock.serve.request import GenerationRequest, Prompt, join_chunks

VOCABULARY = 300
END = 0
GUARD_S = 300  # only guards against hanging
ENDLESS = 10**9  # tokens of an answer that the test ends
FIRST = "{{ messages[0]['content'] }}"


class Letters:
    """A tokenizer with one character per token; some ids are hidden special tokens."""

    def __init__(self, special):
        vocabulary = {special.get(i, chr(i)): i for i in range(VOCABULARY)}
        self.backend_tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        self.backend_tokenizer.add_special_tokens(list(special.values()))
        self.hidden = find_special_tokens(self)

    def decode(self, ids, **_):
        return "".join(chr(token) for token in ids if token not in self.hidden)


class Script:
    """A decoder that predicts t + 1 after token t, and records its inputs."""

    vocabulary = VOCABULARY

    def __init__(self, chunk=None):
        self.chunk = chunk
        self.steps = []  # lengths of the inputs
        self.alive = {}
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.fails = lambda tokens: None  # of all tokens of a sequence

    def start(self, capacity, adapter):
        sequence = object()
        self.alive[id(sequence)] = (sequence, capacity, [])
        return sequence

    def drop(self, sequence):
        self.alive.pop(id(sequence), None)

    def feed(self, feeds):
        self.entered.set()
        assert self.gate.wait(GUARD_S)
        self.steps.append([len(feed.tokens) for feed in feeds])
        rows = []
        for feed in feeds:
            _, capacity, tokens = self.alive[id(feed.sequence)]
            tokens += feed.tokens
            assert len(tokens) <= capacity
            self.fails(tokens)
            row = np.zeros(VOCABULARY, np.float32)
            row[(tokens[-1] + 1) % VOCABULARY] = np.nan if tokens[0] == 99 else 1
            if feed.wants_logits:
                rows.append(row)
        return np.stack(rows)


def build_engine(
    decoder, context=64, special=MappingProxyType({}), begin=(), parsing="prompts", template=FIRST, **limits
):
    """An engine with the scripted decoder; END ends its answers."""
    letters = Letters(special)
    template = ChatTemplate("t", template, {}, tuple(special.values()), parsing == "all")
    served = ServedModel("script", decoder, letters, template, context, frozenset([END]), begin=begin, special_tokens=letters.hidden, parse_special_tokens=parsing)  # fmt: skip
    return Engine(served, EngineConfig(**limits))


class Answer:
    """The chunks of an answer, and their joined text so far."""

    def __init__(self):
        self.chunks = []

    def __getattr__(self, name):
        if not self.chunks:
            return {"text": "", "token_ids": [], "finish_reason": None, "error": ""}[name]
        value = getattr(join_chunks(self.chunks), name)
        return list(value) if name == "token_ids" else value


def submit(engine, tokens, **how):
    answer, prompt, sampling = Answer(), Prompt(token_ids=tokens), SamplingParams(**how)
    GenerationRequest(prompt, sampling).check()
    return engine.submit(prompt, sampling, answer.chunks.append), answer
