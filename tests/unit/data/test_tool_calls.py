"""Tool calls and reasoning in records."""

from __future__ import annotations

from pathlib import Path

import pytest

from oarlock.data.examples.labels import encode_prompt
from oarlock.data.records.conversations import parse_record
from oarlock.data.templates.chat_template import choose_template
from oarlock.errors import DataError
from support.records import QWEN, read

TOOL = {"name": "weather", "description": "how warm", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Oulu"}}}


# tool calls and reasoning


def test_tool_calls_in_common_formats(tokenizer):
    openai = {
        "messages": [
            {"role": "user", "content": "How warm?"},
            {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "c1", "function": {**CALL["function"], "arguments": '{"place": "Oulu"}'}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "-3"},
            {"role": "assistant", "content": "Cold.", "refusal": None},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    }  # fmt: skip
    older = {
        "messages": [
            openai["messages"][0],
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "weather", "arguments": '{"place": "Oulu"}'},
            },
            {"role": "function", "name": "weather", "content": "-3"},
            openai["messages"][3],
        ],
        "functions": [TOOL],
    }
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "How warm?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"place": "Oulu"}}'},
            {"from": "observation", "value": "-3"},
            {"from": "gpt", "value": "Cold."},
        ],
        "tools": f"[{__import__('json').dumps(TOOL)}]",
    }
    swift = {"messages": [
        {"role": "user", "content": "How warm?"},
        {"role": "tool_call", "content": '{"name": "weather", "arguments": {"place": "Oulu"}}'},
        {"role": "tool_response", "content": "-3"},
        {"role": "assistant", "content": "Cold."},
    ], "tools": [TOOL]}  # fmt: skip
    shown, counts = read([openai, older], tokenizer)
    assert not counts.unread
    shown += read([sharegpt], tokenizer)[0] + read([swift], tokenizer)[0]
    assert len(set(shown)) == 1
    expected = '⟦<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"place": "Oulu"}}\n</tool_call><|im_end|>⟧'
    assert (
        expected.replace("<think>\n\n</think>\n\n", "") in shown[0] and '"name": "weather", "description"' in shown[0]
    )
    assert "<|im_start|>user\n<tool_response>\n-3\n</tool_response><|im_end|>" in shown[0], "results are read only"


def test_a_turn_that_the_template_ends_differently_midway(tokenizer, tmp_path):
    path = tmp_path / "harmony.jinja"  # as gpt-oss writes it
    path.write_text(
        "{% for m in messages %}<|user|>{{ m.role }}:\n{% if m.thinking and loop.last %}{{ '(' + m.thinking + ')' }}{% endif %}{{ m.content }}"
        "{% if loop.last and m.role == 'assistant' %}<|endoftext|>{% else %}<|assistant|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|user|>assistant:\n{% endif %}"
    )
    rounds = [
        *({"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "thinking": "t"}),
        *({"role": "user", "content": "r"}, {"role": "assistant", "content": "b", "thinking": "u"}),
    ]
    (shown,), _ = read([{"messages": rounds}], tokenizer, str(path))
    assert shown == (
        "<|user|>user:\nq<|assistant|><|user|>assistant:\n⟦a<|assistant|>⟧<|user|>user:\nr<|assistant|>"
        "<|user|>assistant:\n⟦(u)b<|endoftext|>⟧"
    )


def test_several_calls_at_once_are_one_turn(tokenizer):
    call = {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'}
    record = {
        "conversations": [{"from": "human", "value": "q"}, call, call, {"from": "gpt", "value": "a"}],
        "tools": [TOOL],
    }
    talk = parse_record(record, "sharegpt", "here:1")
    assert [len(message.get("tool_calls", [])) for message in talk.messages] == [0, 2, 0]


def test_tool_calls_that_a_template_drops_are_refused(tokenizer):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}]
    for name, record, expected in (
        ("tokenizer", {"messages": talk}, "data:1: chat template tokenizer does not render messages[1].tool_calls"),
        ("plain", {"messages": talk, "tools": [TOOL]}, "data:1: chat template plain does not render 'tools'"),
        ("chatml", {"messages": [talk[0], {"role": "assistant", "content": "a", "reasoning_content": "r"}]}, "does not render messages[1].reasoning_content"),
    ):  # fmt: skip
        with pytest.raises(DataError) as error:
            read([record], tokenizer, name)
        assert expected in str(error.value)


def test_reasoning_and_variables_reach_the_template(tokenizer):
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "hm"}]}
    (shown,), _ = read([record], tokenizer)
    assert "<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\na<|im_end|>⟧" in shown
    talk = parse_record({**record, "chat_template_kwargs": {"enable_thinking": False}}, "messages", "here:1")
    prompt = encode_prompt(talk, tokenizer, choose_template(QWEN, tokenizer, "messages"), 500)
    assert prompt.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_reasoning_that_a_template_drops_is_reported(tokenizer, tmp_path):
    thinking = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}
    question = {"role": "user", "content": "q"}
    (shown,), counts = read([{"messages": [question, thinking, question, thinking]}], tokenizer)
    assert shown.count("hm") == 1 and "⟦<think>\nhm\n</think>\n\nYes<|im_end|>⟧" in shown and counts.forgotten == 1
    assert "train: in 1 records the chat template drops the reasoning of earlier answers" in counts.describe("train")
    path = Path(__file__).parents[2] / "chat_templates" / "deepseek_r1.jinja"
    with pytest.raises(DataError, match=r"leaves out the reasoning in messages\[1\], which would be trained on"):
        read([{"messages": [question, thinking]}], tokenizer, str(path))


def test_the_reference_answer_contains_the_tool_call(tokenizer):
    record = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [CALL]}],
        "tools": [TOOL],
    }
    prompt = encode_prompt(
        parse_record(record, "messages", "here:1"), tokenizer, choose_template(QWEN, tokenizer, ""), 500
    )
    assert prompt.answer.endswith('<tool_call>\n{"name": "weather", "arguments": {"place": "Oulu"}}\n</tool_call>')
