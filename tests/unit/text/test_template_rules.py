"""What chat templates are allowed to do."""

from __future__ import annotations

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.data.records.messages import MessageError
from oarlock.data.templates import jinja_limits
from oarlock.data.templates.chat_template import BUILT_IN
from oarlock.errors import ConfigError, DataError
from support.template_texts import ALL, ROUND, SPELLINGS, TOOLS, template

CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def render(source: str, messages=ROUND, **more) -> str:
    return template(source).render_chat(messages, **more).text.text


# what templates may use


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{% if loop.index > 1 %}{{ m.content }}{% break %}{% endif %}{{ m.content }}{% continue %}x{% endfor %}", "qa"),
        ("{% for m in messages %}{{ loop.length }}{{ loop.revindex }}{{ loop.last }}{{ m.content }} {% endfor %}", "22Falseq 21Truea "),
        (ALL + "{{ loop is defined }}{{ 'no' if tools is none and documents is none else 'yes' }}", "[user]q[assistant]aFalseno"),
        (ALL + "{{ {'b': 'é<', 'a': [1]} | tojson }}", '[user]q[assistant]a{"b": "é<", "a": [1]}'),
        (ALL + "{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}", '[user]q[assistant]a{"a":1,"b":"\\u00e9"}'),
        (ALL + "{{ [1] | tojson(indent=1) }}", "[user]q[assistant]a[\n 1\n]"),
        (ALL + "{{ strftime_now('%%') }}{{ dict(a=1)['a'] }}{{ namespace(x=2).x }}", "[user]q[assistant]a%12"),
        ("{% for m in messages recursive %}{{ m.content }}{{ loop(m.more) if m.more }}{% endfor %}", "qa"),
        ("{% macro say(x) %}{{ x ~ '!' }}{{ caller() if caller }}{% endmacro %}{% for m in messages %}{{ say(m.content) }}{% endfor %}", "q!a!"),
        ("{{ '%s and %s' % (messages[0].content, messages[1].content) }}", "q and a"),
        ("{{ '{} {}'.format(messages[0].content, messages[1].content) }}", "q a"),
        ("{{ messages | map(attribute='content') | join(', ') }}", "q, a"),
    ],
)  # fmt: skip
def test_everything_transformers_allows_is_accepted(source, expected):
    assert render(source) == expected


def test_generation_blocks_are_found():
    marked = "{% for m in messages %}({% if m.role == 'assistant' %}{%- generation -%} {{ m.content }} {%- endgeneration -%}{% else %}{{ m.content }}{% endif %}){% endfor %}"
    words = [{"role": "user", "content": "</s>"}, {"role": "assistant", "content": "b</s>c"}, *ROUND]
    chat = template(marked).render_chat(words)
    assert [chat.text.text[start:end] for start, end in chat.generations] == ["b</s>c", "a"]
    assert [chat.text.text[start:end] for start, end in chat.text.literal] == ["</s>", "</s>"]
    assert template(ALL).render_chat(words).generations == ()


# what templates may not use


ENDLESS = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "a large range": "{% for i in range(10**9) %}{% endfor %}",
    "itself": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a tree of calls": "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
    "a loop of a loop": "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "many times": "{{ 'a' * 10**10 }}",
    "a sum": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "a join": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "a block": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}{{ n.x }}",
    "lists of lists": "{% set n = namespace(x=['aa']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "output": "{% for i in range(100000) %}{% for j in range(1000) %}" + "y" * 999 + "{% endfor %}{% endfor %}",
    "hidden output": "{% set x %}{% for i in range(100000) %}" + "y" * 9999 + "{% endfor %}{% endset %}",
    "spaces": "{{ 'a'.center(10**10) }}",
    "spaces of a filter": "{{ 'a' | center(10**10) }}",
    "a width": "{{ '%10000000000d' % 1 }}",
    "a width of a format": "{{ '{:10000000000}'.format(1) }}",
    "a large number": "{{ 10 ** (10 ** 9) }}",
    "indents": "{{ messages | tojson(indent=10**9) }}",
    "joined": "{{ range(100000) | join('x' * 1000000) }}",
    "joined by a text": "{{ ('x' * 1000000).join(messages[0].content * 100000) }}",
    "replaced": "{{ ('a' * 10000000).replace('', 'b' * 10000000) }}",
    "columns": "{{ [1] | batch(10**10, 'x') | list }}",
    "repeated lists": "{{ [messages] * 10**10 }}",
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDLESS)
def test_endless_and_memory_hungry_templates_are_stopped(kind, monkeypatch):
    monkeypatch.setattr(jinja_limits, "_MAX_STEPS", 100_000)  # as at the real limit, but sooner
    with pytest.raises(DataError, match=r"chat template mine.*(was stopped|fails: (OverflowError|RecursionError))"):
        template(ALL + ENDLESS[kind]).prepare(ROUND).run()


def test_limits_are_per_thread():
    found: dict[int, str] = {}

    def work(number: int) -> None:
        try:
            found[number] = template(ALL + (ENDLESS["a join"] if number % 2 else "")).prepare(ROUND).run()[0]
        except DataError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(("was stopped" in found[i]) == (i % 2 == 1) for i in range(6))


def test_long_conversations_stay_within_the_limits():
    words = [{"role": role, "content": "word " * 4000} for _ in range(60) for role in ("user", "assistant")]
    built = "{% set n = namespace(t='') %}{% for m in messages %}{% set n.t = n.t + m.role + m.content %}{% endfor %}{{ n.t }}"
    assert len(render(built, words)) > 120 * 20_000


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a\nb\n{{ nothing.more }}", "line 3, fails: UndefinedError: 'nothing' is undefined"),
        ("\n{{ messages[0]['content'] + 1 }}", "line 2, fails: TypeError"),
        ("{{ raise_exception('no') }}", "refuses these messages: no"),
        ("\n\n{{ messages.__class__.__mro__ }}", "line 3, fails: SecurityError"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "line 1, fails: SecurityError"),
        ("{{ messages.append(1) }}", "line 1, fails: SecurityError"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{% include 'x' %}", "line 1, fails: TypeError: no loader"),
    ],
)
def test_a_failing_template_is_named_with_its_line(source, expected):
    with pytest.raises(DataError) as error:
        template(source).prepare(ROUND).run()
    assert expected in str(error.value).replace("chat template mine, ", "")


def test_wrong_jinja_is_named_with_its_line(tmp_path):
    for text, expected in (("\n{% for %}", "line 2: Expected"), ("{% generation %}x", "line 1: Unexpected end"), ("{% foo %}", "line 1: Encountered unknown tag")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"chat template mine, {expected}"):
            template(text).check()


# user text that spells special tokens


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(
        st.lists(
            st.sampled_from(
                [*SPELLINGS, "<|im_", "end|>", " ", "\n", "a", "\U000f0000", "\U000f0001", "\U00100000", "é"]
            ),
            max_size=8,
        ).map("".join),
        min_size=1,
        max_size=4,
    )
)
def test_only_spellings_in_user_text_are_recorded(words):
    source = "{% for m in messages %}<|im_start|>{{ m.content | trim }}{{ m.content.split('a') | join('a') | tojson }}<|im_end|>{% endfor %}"
    chat = template(source).render_chat([{"role": "user", "content": text} for text in words])
    expected = "".join(f"<|im_start|>{text.strip()}{json.dumps(text, ensure_ascii=False)}<|im_end|>" for text in words)
    assert chat.text.text == expected
    noted = [chat.text.text[start:end] for start, end in chat.text.literal]
    count = sum(text.count(spelling) for text in words for spelling in SPELLINGS)
    assert len(noted) == 2 * count and set(noted) <= set(SPELLINGS)
    starts = {start for start, _ in chat.text.literal}
    own = [i for i in range(len(expected)) if expected.startswith("<|im_start|>", i) and i not in starts]
    assert len(own) == len(words), "the template's own stay special"
    loose = template(source, parse_special_tokens=True).render_chat(
        [{"role": "user", "content": text} for text in words]
    )
    assert loose.text.text == expected and not loose.text.literal


def test_spellings_in_tools_and_field_names():
    source = "{{ tools | tojson }}" + ALL
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {"</s>": {"type": "string"}}}}}
    ]
    chat = template(source).render_chat(ROUND, tools=tools)
    assert json.loads(chat.text.text.split("[user]")[0]) == tools and len(chat.text.literal) == 1


# dropped content


@pytest.mark.parametrize(
    ("source", "messages", "more", "problem"),
    [
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", [{"role": "developer", "content": "s"}, *ROUND], {}, "leaves out messages[0] (role system)"),
        ("{{ messages[0].content }}{{ messages[-1].content }}", [*ROUND, *ROUND], {}, "leaves out messages[1] (role assistant)"),
        (ALL, [*ROUND[:1], {"role": "assistant", "content": "b", "tool_calls": [CALL]}], {}, "does not render messages[1].tool_calls"),
        (ALL, [*ROUND[:1], {"role": "assistant", "content": None, "tool_calls": [CALL]}], {}, "does not render messages[1].tool_calls"),
        ("{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls else m.content }}{% endfor %}", [*ROUND[:1], {"role": "assistant", "content": "b", "tool_calls": [CALL]}], {}, "leaves out messages[1] (role assistant) next to its tool calls"),
        (ALL, ROUND, {"tools": TOOLS}, "does not render 'tools'"),
        (ALL, [*ROUND[:1], {**ROUND[1], "reasoning": "r"}], {}, "does not render messages[1].reasoning_content"),
        ("{% for m in messages %}{{ 'A' if m.role == 'assistant' else 'U' }}{{ m.content }}{% endfor %}", [*ROUND, {"role": "tool", "content": "42"}], {}, "renders messages[2] (role tool) as a user message"),
    ],
)  # fmt: skip
def test_content_that_a_template_drops_is_named(source, messages, more, problem):
    with pytest.raises(DataError) as error:
        template(source).render_chat(messages, **more)
    assert str(error.value) == f"chat template mine {problem}"


def test_rendered_content_is_accepted():
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{{ m.reasoning_content }}{% endfor %}"
    assert '"arguments": {"x": 1}' in render(
        source, [*ROUND[:1], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    )
    assert render(source, [*ROUND, {"role": "tool", "content": "42"}]).endswith("<tool>42")
    earlier = "{% for m in messages %}{{ m.content }}{{ m.reasoning_content if loop.last }}{% endfor %}"  # as in Qwen3
    assert render(earlier, [{**ROUND[1], "thinking": "r"}, {**ROUND[1], "thinking": "s"}]) == "aas"
    # A template that fails on any other text: the text itself is searched for.
    picky = "{% for m in messages %}{{ m.content if m.content in ('q', 'a') else raise_exception('no') }}{% endfor %}"
    assert render(picky) == "qa"
    with pytest.raises(DataError, match=r"leaves out messages\[1\]"):
        render("{{ messages[0].content if messages[0].content == 'q' else raise_exception('no') }}")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "must be a non-empty list of messages"),
        ([{"role": "assitant", "content": "a"}], "field 'messages[0].role' is 'assitant' (did you mean 'assistant'?)"),
        ([{"role": "User", "content": "a"}], "field 'messages[0].role' is 'User' (did you mean 'user'?)"),
        ([{"content": "a"}], "field 'messages[0].role' is missing"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "field 'messages[0].content' has parts that are not text"),
        ([{"role": "user", "content": "a", "tool_calls": [CALL]}], "only an assistant calls tools"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "messages[0].tool_calls[0].function.arguments' is not valid JSON"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}], "must have the name of the function"),
        ([{"role": "assistant", "content": "a", "reasoning_content": 1}], "field 'messages[0].reasoning_content' holds int"),
    ],
)  # fmt: skip
def test_invalid_messages_are_refused(messages, expected):
    with pytest.raises(MessageError) as error:
        template(ALL).render_chat(messages)
    assert expected in str(error.value)


def test_the_last_message_is_continued():
    chatml = template(BUILT_IN["chatml"])
    chat = chatml.render_chat(
        [*ROUND[:1], {"role": "assistant", "content": "so far </s>"}], continue_final_message=True
    )
    assert chat.text.text.endswith("<|im_start|>assistant\nso far </s>") and len(chat.text.literal) == 1
