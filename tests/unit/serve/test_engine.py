"""The engine with a scripted decoder: which requests run, which are cancelled, and how errors affect the others."""

from __future__ import annotations

import threading
import time

import pytest

from oarlock.errors import RequestRefused
from oarlock.sampling.params import SamplingParams
from oarlock.serve.request import Prompt, QueueFull
from support.scripted_engine import ENDLESS, GUARD_S, Script, submit


def test_chunks_of_an_answer(make_engine):
    engine = make_engine(Script())
    request, answer = submit(engine, [65, 66], max_tokens=4)
    assert request.wait(GUARD_S)
    assert [chunk.text for chunk in answer.chunks] == ["C", "D", "E", "F"] and answer.token_ids == [67, 68, 69, 70]
    assert [chunk.completion_tokens for chunk in answer.chunks] == [1, 2, 3, 4] and answer.prompt_tokens == 2
    assert [chunk.finish_reason for chunk in answer.chunks] == [None, None, None, "length"]
    # the model's own end token, which is not in the answer
    request, answer = submit(engine, [298], max_tokens=4)
    assert request.wait(GUARD_S) and answer.token_ids == [299] and answer.finish_reason == "stop"
    request, answer = submit(engine, [298], max_tokens=4, ignore_eos=True)
    assert request.wait(GUARD_S) and answer.token_ids == [299, 0, 1, 2] and answer.finish_reason == "length"
    request, answer = submit(engine, [65], max_tokens=9, stop_token_ids=(69,))
    assert request.wait(GUARD_S) and answer.token_ids == [66, 67, 68] and answer.finish_reason == "stop"
    request, answer = submit(engine, [65], max_tokens=9, stop=("EF", "zz"))
    assert request.wait(GUARD_S) and answer.text == "BCD" and answer.token_ids == [66, 67, 68, 69, 70]
    assert answer.finish_reason == "stop" and [chunk.text for chunk in answer.chunks] == ["B", "C", "D", "", ""]
    request, answer = submit(engine, [65], max_tokens=5, stop=("FG",))  # held back until the answer ends
    assert request.wait(GUARD_S) and answer.text == "BCDEF" and answer.finish_reason == "length"
    request, answer = submit(engine, [65], max_tokens=6, min_tokens=3, stop=("C", "F"), stop_token_ids=(67,))
    assert request.wait(GUARD_S) and 67 not in answer.token_ids and answer.finish_reason in ("stop", "length")


def test_requests_join_and_leave_between_steps(make_engine):
    decoder = Script()
    engine = make_engine(decoder, max_batch=2)
    decoder.gate.clear()
    asked = [submit(engine, [1 + i] * (3 + i), max_tokens=count) for i, count in enumerate((8, 2, 3, 1))]
    decoder.gate.set()
    assert all(request.wait(GUARD_S) for request, _ in asked)
    assert [len(answer.token_ids) for _, answer in asked] == [8, 2, 3, 1]
    assert max(map(len, decoder.steps)) == 2 and not decoder.alive
    assert any(5 in step and 1 in step for step in decoder.steps), (
        "the third prompt was read between the steps of an answer"
    )
    assert len(decoder.steps) <= 8 + 1


def test_long_prompts_are_prefilled_in_parts_between_decode_steps(make_engine):
    decoder = Script(chunk=10)
    engine = make_engine(decoder, context=200)
    decoder.gate.clear()
    asked = [submit(engine, list(range(1, 1 + n)), max_tokens=6) for n in (3, 25, 12)]
    decoder.gate.set()
    assert all(request.wait(GUARD_S) for request, _ in asked)
    assert [answer.token_ids[0] for _, answer in asked] == [4, 26, 13]
    assert all(sum(count for count in step if count > 1) <= 10 for step in decoder.steps)
    assert any(1 in step and max(step) > 1 for step in decoder.steps), "answers continue while a prompt is read"


def test_a_cancelled_request_frees_its_slot(make_engine):
    decoder = Script()
    engine = make_engine(decoder, context=ENDLESS, max_batch=1, max_tokens=ENDLESS)
    first, answer = submit(engine, [1], ignore_eos=True)
    second, other = submit(engine, [5], max_tokens=2)
    while not answer.token_ids:
        time.sleep(0.001)
    first.cancel()
    assert second.wait(GUARD_S) and other.token_ids == [6, 7]
    assert (
        first.wait(GUARD_S)
        and answer.finish_reason == "cancelled"
        and answer.completion_tokens == len(answer.token_ids)
    )
    assert not decoder.alive and engine.info()["busy"] == 0
    chunks = engine.stream(Prompt(token_ids=[1]), SamplingParams(ignore_eos=True))
    chunk = next(chunks)
    chunks.close()  # a caller that leaves its loop
    assert chunk.token_ids == (2,) and submit(engine, [5], max_tokens=1)[0].wait(GUARD_S)


def test_a_waiting_request_can_be_cancelled_and_times_out(make_engine):
    decoder = Script()
    engine = make_engine(decoder, max_batch=1, timeout=0.3)
    decoder.gate.clear()
    _, running = submit(engine, [1], max_tokens=30)
    assert decoder.entered.wait(GUARD_S)
    (cancelled, one), (late, other) = submit(engine, [2], max_tokens=3), submit(engine, [3], max_tokens=3)
    cancelled.cancel()
    time.sleep(0.4)
    decoder.gate.set()
    assert cancelled.wait(GUARD_S) and one.finish_reason == "cancelled" and not one.token_ids
    assert late.wait(GUARD_S) and other.finish_reason == "error" and "longer than the 0.3 seconds" in other.error
    assert running.finish_reason == "error"


def test_an_error_ends_only_its_own_request(make_engine):
    decoder = Script()

    def fails(tokens):
        if 7 in tokens:
            raise MemoryError("no room for 7")

    decoder.fails = fails
    decoder.gate.clear()
    engine = make_engine(decoder)
    asked = [submit(engine, [start], max_tokens=4, ignore_eos=True) for start in (40, 5, 99, 20)]
    decoder.gate.set()
    assert all(request.wait(GUARD_S) for request, _ in asked)
    good, bad, nan, other = (answer for _, answer in asked)
    assert good.token_ids == [41, 42, 43, 44] and other.token_ids == [21, 22, 23, 24]
    assert bad.token_ids == [6, 7] and bad.finish_reason == "error" and bad.error == "MemoryError: no room for 7"
    assert nan.finish_reason == "error" and "not finite" in nan.error and not nan.token_ids
    request, answer = submit(engine, [50], max_tokens=1)
    assert request.wait(GUARD_S) and answer.token_ids == [51] and not decoder.alive


def test_an_engine_failure_ends_all_requests(make_engine, monkeypatch, capsys):
    decoder = Script()
    engine = make_engine(decoder)
    schedule = engine._schedule
    monkeypatch.setattr(engine, "_schedule", lambda: 1 / 0)
    monkeypatch.setattr(decoder, "drop", lambda sequence: 1 / 0)
    request, answer = submit(engine, [1], max_tokens=3)
    assert (
        request.wait(GUARD_S) and answer.finish_reason == "error" and "the engine failed: ZeroDivision" in answer.error
    )
    monkeypatch.setattr(engine, "_schedule", schedule)
    request, answer = submit(engine, [1], max_tokens=3)
    assert request.wait(GUARD_S) and answer.token_ids == [2, 3, 4]
    engine.close()
    assert "could not be dropped" in capsys.readouterr().out


def test_a_request_whose_callback_fails_is_cancelled(make_engine, capsys):
    decoder = Script()
    engine = make_engine(decoder, context=ENDLESS, max_tokens=ENDLESS)

    def broken(chunk):
        raise ConnectionError("gone")

    request = engine.submit(Prompt(token_ids=[1]), SamplingParams(ignore_eos=True), broken)
    other, answer = submit(engine, [5], max_tokens=3)
    assert request.wait(GUARD_S) and other.wait(GUARD_S) and answer.token_ids == [6, 7, 8] and not decoder.alive
    assert "ConnectionError: gone" in capsys.readouterr().out


def test_the_queue_is_bounded(make_engine):
    decoder = Script()
    decoder.gate.clear()
    engine = make_engine(decoder, max_batch=1, max_queue=2)
    asked = [submit(engine, [1], max_tokens=1)]
    assert decoder.entered.wait(GUARD_S)
    asked += [submit(engine, [1], max_tokens=1) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait"):
        submit(engine, [1], max_tokens=1)
    assert engine.info()["waiting"] == 2 and engine.info()["busy"] == 1
    decoder.gate.set()
    assert all(request.wait(GUARD_S) for request, _ in asked)
    assert submit(engine, [1], max_tokens=1)[0].wait(GUARD_S)


@pytest.mark.parametrize("drain", [True, False])
def test_closing_the_engine_ends_all_requests(make_engine, drain):
    decoder = Script()
    decoder.gate.clear()
    engine = make_engine(decoder, max_batch=1)
    asked = [submit(engine, [1], max_tokens=3) for _ in range(4)]
    assert decoder.entered.wait(GUARD_S)
    closing = threading.Thread(target=engine.close, args=(drain,))
    closing.start()
    while not engine._closing:
        time.sleep(0.001)
    with pytest.raises(QueueFull, match="closing"):
        submit(engine, [1], max_tokens=1)
    decoder.gate.set()
    closing.join(GUARD_S)
    assert not closing.is_alive() and all(request.wait(0) for request, _ in asked)
    assert {answer.finish_reason for _, answer in asked} == {"length" if drain else "cancelled"}
    assert not decoder.alive


def test_length_limits_of_an_answer(make_engine):
    engine = make_engine(Script(), context=64, max_length=20, max_tokens=8)
    request, answer = submit(engine, [1] * 15, ignore_eos=True)
    assert request.wait(GUARD_S) and answer.completion_tokens == 5  # the remaining length
    request, answer = submit(engine, [1] * 5, ignore_eos=True)
    assert request.wait(GUARD_S) and answer.completion_tokens == 8
    request, answer = submit(engine, [1] * 18, ignore_eos=True, default_tokens=4)
    assert request.wait(GUARD_S) and answer.completion_tokens == 2
    request, answer = submit(engine, [1] * 5, ignore_eos=True, default_tokens=4)
    assert request.wait(GUARD_S) and answer.completion_tokens == 4
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
def test_wrong_sampling_is_refused_by_name(make_engine, field, value):
    with pytest.raises(RequestRefused, match=field):
        SamplingParams(**{field: value}).check()
