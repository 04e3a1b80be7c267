"""How the engine reads a request: stop texts in special tokens, begin tokens, spelled special tokens, messages."""

from __future__ import annotations

import pytest

from oarlock.errors import RequestRefused
from oarlock.sampling.params import SamplingParams
from oarlock.serve.request import GenerationRequest, Prompt
from support.scripted_engine import GUARD_S, Script, submit


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (("<x>",), "BCDE", 5),  # hidden in the text nevertheless
        (("DE<x>G",), "BC", 6),  # with the text around it
        (("E<x>",), "BCD", 5),
        (("<x>H",), "BCDEG", 6),  # is not reported
        ((">",), "BCDE", 5),
    ],
)
def test_stop_texts_are_found_in_special_tokens(make_engine, stop, text, tokens):
    engine = make_engine(Script(), special={70: "<x>"})
    request, answer = submit(engine, [65], max_tokens=6, stop=stop)
    assert request.wait(GUARD_S) and (answer.text, answer.completion_tokens) == (text, tokens)
    assert answer.finish_reason == ("length" if "H" in stop[0] else "stop")
    request, answer = submit(engine, [65], max_tokens=6)
    assert request.wait(GUARD_S) and answer.text == "BCDEG" and answer.completion_tokens == 6


def test_a_stop_text_ends_nothing_before_min_tokens(make_engine):
    engine = make_engine(Script(), special={70: "<x>"})
    request, answer = submit(engine, [65], max_tokens=8, min_tokens=5, stop=("<x>", "I"))
    assert request.wait(GUARD_S) and answer.text == "BCDEGH" and answer.finish_reason == "stop"


def ids_of(engine, **prompt):
    asked = GenerationRequest(Prompt(**prompt), SamplingParams())
    asked.check()
    return engine.submit(asked.prompt, asked.sampling, lambda chunk: None).prompt_ids


def test_raw_prompts_have_one_begin_token(make_engine):
    engine = make_engine(Script(), special={70: "<x>"}, begin=(70,))
    assert ids_of(engine, text="AB") == [70, 65, 66] == ids_of(engine, text="<x>AB")
    assert ids_of(engine, text="A<x>") == [70, 65, 70] and ids_of(engine, text="<x>") == [70]
    assert ids_of(engine, token_ids=[65]) == [65]
    two = make_engine(Script(), special={70: "<x>", 71: "<y>"}, begin=(70, 71))
    assert ids_of(two, text="<x><y>A") == [70, 71, 65] == ids_of(two, text="A")


@pytest.mark.parametrize(
    ("parsing", "raw", "said"), [("prompts", [70], "<x>"), ("all", [70], [70]), ("none", "<x>", "<x>")]
)
def test_special_tokens_in_client_text(make_engine, parsing, raw, said):
    engine = make_engine(Script(), special={70: "<x>"}, parsing=parsing)
    text, messages = "<x>", [{"role": "user", "content": "<x>"}]
    assert ids_of(engine, text=text) == (list(map(ord, raw)) if isinstance(raw, str) else raw)
    assert ids_of(engine, messages=messages) == (list(map(ord, said)) if isinstance(said, str) else said)


def expect_refusal(engine, messages, **more):
    with pytest.raises(RequestRefused) as caught:
        ids_of(engine, messages=messages, **more)
    return str(caught.value)


ANY_ROLE = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
WITH_NAMES = "{% for m in messages %}{{ m.name or m.role }}:{{ m.content }};{% endfor %}"


def test_messages_that_a_template_drops_are_named(make_engine):
    user = {"role": "user", "content": "hi"}
    engine = make_engine(Script(), context=200)
    assert "messages[1]" in expect_refusal(engine, [user, {"role": "assistant", "content": "lost"}])
    assert "messages[0].role" in expect_refusal(engine, [{"role": "assitant", "content": "x"}])
    assert "tools" in expect_refusal(engine, [user], tools=[{"type": "function", "function": {"name": "f"}}])
    assert "messages[0].name" in expect_refusal(engine, [{**user, "name": "anna"}])
    part = {"type": "text", "text": "a", "cache_control": {}}
    assert "content[0].cache_control" in expect_refusal(engine, [{"role": "user", "content": [part]}])
    with pytest.raises(RequestRefused, match="tools go with messages"):
        Prompt(text="a", tools=[]).check()
    nameful = make_engine(Script(), context=200, template=WITH_NAMES)
    assert ids_of(nameful, messages=[{**user, "name": "anna"}]) == list(map(ord, "anna:hi;"))


def test_the_developer_role_is_the_system_role(make_engine):
    engine = make_engine(Script(), context=200, template=ANY_ROLE)
    system, developer = (
        [{"role": role, "content": "a"}, {"role": "user", "content": "b"}] for role in ("system", "developer")
    )
    assert ids_of(engine, messages=system) == ids_of(engine, messages=developer) == list(map(ord, "[system]a[user]b"))


def test_the_message_of_a_template_error_is_reported(make_engine):
    only_users = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{{ raise_exception('who?') }}{% endif %}{% endfor %}"  # fmt: skip
    engine = make_engine(Script(), context=200, template=only_users)
    said = expect_refusal(engine, [{"role": "user", "content": "a"}, {"role": "function", "name": "f", "content": "b"}])
    assert said.startswith("messages[1] (role function): ") and "who?" in said
    assert expect_refusal(engine, [{"role": "assistant", "content": "a"}]).endswith("who?")
