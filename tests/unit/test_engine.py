"""The engine around a scripted decoder: who gets a place, who loses it, and what an error does to the others."""

from __future__ import annotations

import threading
import time
from types import MappingProxyType

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from oarlock.data.templates import ChatTemplate
from oarlock.serve.engine import Engine
from oarlock.serve.loading import Served
from oarlock.serve.prompts import hidden_tokens
from oarlock.serve.requests import Answer, Limits, Prompt, QueueFull, RequestRefused, Sampling

VOCABULARY = 300
END = 0
FIRST = "{{ messages[0]['content'] }}"


class Letters:
    """Text of one character a token; special ones stand in the place of some, and are shown to nobody."""

    def __init__(self, special):
        vocabulary = {special.get(i, chr(i)): i for i in range(VOCABULARY)}
        self.backend_tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        self.backend_tokenizer.add_special_tokens(list(special.values()))
        self.hidden = hidden_tokens(self)

    def decode(self, ids, **_):
        return "".join(chr(token) for token in ids if token not in self.hidden)


class Script:
    """After a token t comes t + 1; keeps account of what it is fed."""

    vocabulary = VOCABULARY

    def __init__(self, chunk=None):
        self.chunk = chunk
        self.steps = []  # lengths of what was fed
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
        assert self.gate.wait(20)
        self.steps.append([len(feed.tokens) for feed in feeds])
        rows = []
        for feed in feeds:
            _, capacity, tokens = self.alive[id(feed.sequence)]
            tokens += feed.tokens
            assert len(tokens) <= capacity
            self.fails(tokens)
            row = np.zeros(VOCABULARY, np.float32)
            row[(tokens[-1] + 1) % VOCABULARY] = np.nan if tokens[0] == 99 else 1
            if feed.scored:
                rows.append(row)
        return np.stack(rows)


@pytest.fixture
def make():
    engines = []

    def build(decoder, context=64, special=MappingProxyType({}), begin=(), parsing="prompts", template=FIRST, **limits):
        letters = Letters(special)
        template = ChatTemplate("t", template, {}, tuple(special.values()), parsing == "all")
        served = Served("script", decoder, letters, template, context, frozenset([END]), begin=begin, special_tokens=letters.hidden, parse_special_tokens=parsing)  # fmt: skip
        engines.append(Engine(served, Limits(**limits)))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close(drain=False)


def submit(engine, tokens, **how):
    answer = Answer()
    answer.pieces = []

    def take(piece):
        answer.add(piece)
        answer.pieces.append(piece)

    return engine.submit(Prompt(token_ids=tokens), Sampling(**how), take), answer


def test_pieces_of_an_answer(make):
    engine = make(Script())
    ticket, answer = submit(engine, [65, 66], max_tokens=4)
    assert ticket.wait(10)
    assert [piece.text for piece in answer.pieces] == ["C", "D", "E", "F"] and answer.token_ids == [67, 68, 69, 70]
    assert [piece.index for piece in answer.pieces] == [0, 1, 2, 3]
    assert [piece.completion_tokens for piece in answer.pieces] == [1, 2, 3, 4] and answer.prompt_tokens == 2
    assert [piece.finish_reason for piece in answer.pieces] == [None, None, None, "length"]
    # the model's own end, with nothing of it in the answer
    ticket, answer = submit(engine, [298], max_tokens=4)
    assert ticket.wait(10) and answer.token_ids == [299] and answer.finish_reason == "stop"
    ticket, answer = submit(engine, [298], max_tokens=4, ignore_eos=True)
    assert ticket.wait(10) and answer.token_ids == [299, 0, 1, 2] and answer.finish_reason == "length"
    ticket, answer = submit(engine, [65], max_tokens=9, stop_token_ids=(69,))
    assert ticket.wait(10) and answer.token_ids == [66, 67, 68] and answer.finish_reason == "stop"
    ticket, answer = submit(engine, [65], max_tokens=9, stop=("EF", "zz"))
    assert ticket.wait(10) and answer.text == "BCD" and answer.token_ids == [66, 67, 68, 69, 70]
    assert answer.finish_reason == "stop" and [piece.text for piece in answer.pieces] == ["B", "C", "D", "", ""]
    ticket, answer = submit(engine, [65], max_tokens=5, stop=("FG",))  # held back, then there is no more
    assert ticket.wait(10) and answer.text == "BCDEF" and answer.finish_reason == "length"
    ticket, answer = submit(engine, [65], max_tokens=6, min_tokens=3, stop=("C", "F"), stop_token_ids=(67,))
    assert ticket.wait(10) and 67 not in answer.token_ids and answer.finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (("<x>",), "BCDE", 5),  # hidden in the text all the same
        (("DE<x>G",), "BC", 6),  # with what stands around it
        (("E<x>",), "BCD", 5),
        (("<x>H",), "BCDEG", 6),  # is not said
        ((">",), "BCDE", 5),
    ],
)
def test_stop_texts_are_found_in_special_tokens(make, stop, text, tokens):
    engine = make(Script(), special={70: "<x>"})
    ticket, answer = submit(engine, [65], max_tokens=6, stop=stop)
    assert ticket.wait(10) and (answer.text, answer.completion_tokens) == (text, tokens)
    assert answer.finish_reason == ("length" if "H" in stop[0] else "stop")
    ticket, answer = submit(engine, [65], max_tokens=6)
    assert ticket.wait(10) and answer.text == "BCDEG" and answer.completion_tokens == 6


def test_a_stop_text_ends_nothing_before_min_tokens(make):
    engine = make(Script(), special={70: "<x>"})
    ticket, answer = submit(engine, [65], max_tokens=8, min_tokens=5, stop=("<x>", "I"))
    assert ticket.wait(10) and answer.text == "BCDEGH" and answer.finish_reason == "stop"


def ids_of(engine, **prompt):
    return engine._ticket(Prompt(**prompt), Sampling(), lambda piece: None).prompt_ids


def test_raw_prompts_begin_once(make):
    engine = make(Script(), special={70: "<x>"}, begin=(70,))
    assert ids_of(engine, text="AB") == [70, 65, 66] == ids_of(engine, text="<x>AB")
    assert ids_of(engine, text="A<x>") == [70, 65, 70] and ids_of(engine, text="<x>") == [70]
    assert ids_of(engine, token_ids=[65]) == [65]
    two = make(Script(), special={70: "<x>", 71: "<y>"}, begin=(70, 71))
    assert ids_of(two, text="<x><y>A") == [70, 71, 65] == ids_of(two, text="A")


@pytest.mark.parametrize(
    ("parsing", "raw", "said"), [("prompts", [70], "<x>"), ("all", [70], [70]), ("none", "<x>", "<x>")]
)
def test_special_tokens_in_a_clients_text(make, parsing, raw, said):
    engine = make(Script(), special={70: "<x>"}, parsing=parsing)
    text, messages = "<x>", [{"role": "user", "content": "<x>"}]
    assert ids_of(engine, text=text) == (list(map(ord, raw)) if isinstance(raw, str) else raw)
    assert ids_of(engine, messages=messages) == (list(map(ord, said)) if isinstance(said, str) else said)


def refusal(engine, messages, **more):
    with pytest.raises(RequestRefused) as caught:
        ids_of(engine, messages=messages, **more)
    return str(caught.value)


ANY_ROLE = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
WITH_NAMES = "{% for m in messages %}{{ m.name or m.role }}:{{ m.content }};{% endfor %}"


def test_messages_that_are_lost_are_named(make):
    user = {"role": "user", "content": "hi"}
    engine = make(Script(), context=200)
    assert "messages[1]" in refusal(engine, [user, {"role": "assistant", "content": "lost"}])
    assert "messages[0].role" in refusal(engine, [{"role": "assitant", "content": "x"}])
    assert "tools" in refusal(engine, [user], tools=[{"type": "function", "function": {"name": "f"}}])
    assert "messages[0].name" in refusal(engine, [{**user, "name": "anna"}])
    part = {"type": "text", "text": "a", "cache_control": {}}
    assert "content[0].cache_control" in refusal(engine, [{"role": "user", "content": [part]}])
    with pytest.raises(RequestRefused, match="tools go with messages"):
        Prompt(text="a", tools=[]).check()
    nameful = make(Script(), context=200, template=WITH_NAMES)
    assert ids_of(nameful, messages=[{**user, "name": "anna"}]) == list(map(ord, "anna:hi;"))


def test_developer_is_system(make):
    engine = make(Script(), context=200, template=ANY_ROLE)
    system, developer = (
        [{"role": role, "content": "a"}, {"role": "user", "content": "b"}] for role in ("system", "developer")
    )
    assert ids_of(engine, messages=system) == ids_of(engine, messages=developer) == list(map(ord, "[system]a[user]b"))


def test_requests_join_and_leave_between_steps(make):
    decoder = Script()
    engine = make(decoder, max_batch=2)
    decoder.gate.clear()
    asked = [submit(engine, [1 + i] * (3 + i), max_tokens=count) for i, count in enumerate((8, 2, 3, 1))]
    decoder.gate.set()
    assert all(ticket.wait(10) for ticket, _ in asked)
    assert [len(answer.token_ids) for _, answer in asked] == [8, 2, 3, 1]
    assert max(map(len, decoder.steps)) == 2 and not decoder.alive
    assert any(5 in step and 1 in step for step in decoder.steps), "the third prompt was read beside an answer"
    assert len(decoder.steps) <= 8 + 1


def test_long_prompts_are_read_in_parts_beside_answers(make):
    decoder = Script(chunk=10)
    engine = make(decoder, context=200)
    decoder.gate.clear()
    asked = [submit(engine, list(range(1, 1 + n)), max_tokens=6) for n in (3, 25, 12)]
    decoder.gate.set()
    assert all(ticket.wait(10) for ticket, _ in asked)
    assert [answer.token_ids[0] for _, answer in asked] == [4, 26, 13]
    assert all(sum(count for count in step if count > 1) <= 10 for step in decoder.steps)
    assert any(1 in step and max(step) > 1 for step in decoder.steps), "answers go on while a prompt is read"


def test_a_cancelled_request_frees_its_place(make):
    decoder = Script()
    engine = make(decoder, context=10_000, max_batch=1, max_tokens=9000)
    first, answer = submit(engine, [1], ignore_eos=True)
    second, other = submit(engine, [5], max_tokens=2)
    while not answer.token_ids:
        time.sleep(0.001)
    first.cancel()
    assert second.wait(10) and other.token_ids == [6, 7]
    assert first.wait(10) and answer.finish_reason == "cancelled" and answer.completion_tokens == len(answer.token_ids)
    assert not decoder.alive and engine.info()["busy"] == 0
    pieces = engine.stream(Prompt(token_ids=[1]), Sampling(ignore_eos=True))
    piece = next(pieces)
    pieces.close()  # a caller that leaves its loop
    assert piece.token_ids == (2,) and submit(engine, [5], max_tokens=1)[0].wait(10)


def test_a_waiting_request_can_be_cancelled_and_runs_out_of_time(make):
    decoder = Script()
    engine = make(decoder, max_batch=1, seconds=0.3)
    decoder.gate.clear()
    _, running = submit(engine, [1], max_tokens=30)
    assert decoder.entered.wait(10)
    (cancelled, one), (late, other) = submit(engine, [2], max_tokens=3), submit(engine, [3], max_tokens=3)
    cancelled.cancel()
    time.sleep(0.4)
    decoder.gate.set()
    assert cancelled.wait(10) and one.finish_reason == "cancelled" and not one.token_ids
    assert late.wait(10) and other.finish_reason == "error" and "longer than the 0.3 seconds" in other.error
    assert running.finish_reason == "error"


def test_an_error_ends_only_the_request_it_belongs_to(make):
    decoder = Script()

    def fails(tokens):
        if 7 in tokens:
            raise MemoryError("no room for 7")

    decoder.fails = fails
    decoder.gate.clear()
    engine = make(decoder)
    asked = [submit(engine, [start], max_tokens=4, ignore_eos=True) for start in (40, 5, 99, 20)]
    decoder.gate.set()
    assert all(ticket.wait(10) for ticket, _ in asked)
    good, bad, nan, other = (answer for _, answer in asked)
    assert good.token_ids == [41, 42, 43, 44] and other.token_ids == [21, 22, 23, 24]
    assert bad.token_ids == [6, 7] and bad.finish_reason == "error" and bad.error == "MemoryError: no room for 7"
    assert nan.finish_reason == "error" and "not finite" in nan.error and not nan.token_ids
    ticket, answer = submit(engine, [50], max_tokens=1)
    assert ticket.wait(10) and answer.token_ids == [51] and not decoder.alive


def test_a_failure_of_the_engine_leaves_nobody_waiting(make, monkeypatch, capsys):
    decoder = Script()
    engine = make(decoder)
    shares = engine._shares
    monkeypatch.setattr(engine, "_shares", lambda: 1 / 0)
    monkeypatch.setattr(decoder, "drop", lambda sequence: 1 / 0)
    ticket, answer = submit(engine, [1], max_tokens=3)
    assert ticket.wait(10) and answer.finish_reason == "error" and "the engine failed: ZeroDivision" in answer.error
    monkeypatch.setattr(engine, "_shares", shares)
    ticket, answer = submit(engine, [1], max_tokens=3)
    assert ticket.wait(10) and answer.token_ids == [2, 3, 4]
    engine.close()
    assert "could not be dropped" in capsys.readouterr().out


def test_a_client_that_fails_is_cancelled(make, capsys):
    decoder = Script()
    engine = make(decoder, context=10_000, max_tokens=9000)

    def broken(piece):
        raise ConnectionError("gone")

    ticket = engine.submit(Prompt(token_ids=[1]), Sampling(ignore_eos=True), broken)
    other, answer = submit(engine, [5], max_tokens=3)
    assert ticket.wait(10) and other.wait(10) and answer.token_ids == [6, 7, 8] and not decoder.alive
    assert "ConnectionError: gone" in capsys.readouterr().out


def test_the_queue_has_an_end(make):
    decoder = Script()
    decoder.gate.clear()
    engine = make(decoder, max_batch=1, max_queue=2)
    asked = [submit(engine, [1], max_tokens=1)]
    assert decoder.entered.wait(10)
    asked += [submit(engine, [1], max_tokens=1) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait"):
        submit(engine, [1], max_tokens=1)
    assert engine.info()["waiting"] == 2 and engine.info()["busy"] == 1
    decoder.gate.set()
    assert all(ticket.wait(10) for ticket, _ in asked)
    assert submit(engine, [1], max_tokens=1)[0].wait(10)


@pytest.mark.parametrize("drain", [True, False])
def test_closing(make, drain):
    decoder = Script()
    decoder.gate.clear()
    engine = make(decoder, max_batch=1)
    asked = [submit(engine, [1], max_tokens=3) for _ in range(4)]
    assert decoder.entered.wait(10)
    closing = threading.Thread(target=engine.close, args=(drain,))
    closing.start()
    while not engine._closing:
        time.sleep(0.001)
    with pytest.raises(QueueFull, match="closing"):
        submit(engine, [1], max_tokens=1)
    decoder.gate.set()
    closing.join(10)
    assert not closing.is_alive() and all(ticket.wait(0) for ticket, _ in asked)
    assert {answer.finish_reason for _, answer in asked} == {"length" if drain else "cancelled"}
    assert not decoder.alive


def test_limits_of_an_answer(make):
    engine = make(Script(), context=64, max_length=20, max_tokens=8)
    ticket, answer = submit(engine, [1] * 15, ignore_eos=True)
    assert ticket.wait(10) and answer.completion_tokens == 5  # what the length leaves
    ticket, answer = submit(engine, [1] * 5, ignore_eos=True)
    assert ticket.wait(10) and answer.completion_tokens == 8
    ticket, answer = submit(engine, [1] * 18, ignore_eos=True, default_tokens=4)
    assert ticket.wait(10) and answer.completion_tokens == 2
    ticket, answer = submit(engine, [1] * 5, ignore_eos=True, default_tokens=4)
    assert ticket.wait(10) and answer.completion_tokens == 4
    with pytest.raises(RequestRefused, match="leaves 2 of 20"):
        submit(engine, [1] * 18, max_tokens=3)
    with pytest.raises(RequestRefused, match="may have 8"):
        submit(engine, [1], max_tokens=9)
    with pytest.raises(RequestRefused, match="together may have 20"):
        submit(engine, [1] * 20)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("temperature", "1"), ("top_p", 0), ("top_p", 1.1),
     ("top_k", -1), ("top_k", 1.5), ("repetition_penalty", 0), ("frequency_penalty", float("inf")), ("max_tokens", 0),
     ("max_tokens", True), ("min_tokens", -1), ("seed", 2**64), ("seed", 0.5), ("stop", ("",)), ("stop", "ab"),
     ("stop_token_ids", (1.0,)), ("presence_penalty", 101)],
)  # fmt: skip
def test_wrong_sampling_is_refused_by_name(make, field, value):
    with pytest.raises(RequestRefused, match=field):
        Sampling(**{field: value}).check()
