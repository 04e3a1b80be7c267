"""Fine-tuning records under the names people have, with tool calls, reasoning and marks of turns."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.config.finetune import FinetuneDataSection
from oarlock.data.examples.encode import Counts, Recipe, encode_source
from oarlock.data.examples.eval_prompts import load_eval_prompts
from oarlock.data.examples.inspect import check_data
from oarlock.data.examples.labels import encode_prompt
from oarlock.data.examples.marked_text import MarkedText
from oarlock.data.examples.preview import marked, show_data
from oarlock.data.records.conversations import detect_form, parse_record
from oarlock.data.records.record_stream import RowRecords
from oarlock.data.templates.chat_template import choose_template
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.data.tokenizers.offsets import tokenize
from oarlock.errors import DataError

QWEN = str(Path(__file__).parents[2] / "chat_templates" / "qwen3.jinja")
TOOL = {"name": "weather", "description": "how warm", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Oulu"}}}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(str(tiny_tokenizer))


def read(records: list, tokenizer, template: str = QWEN, **more):
    """What is shown of each record, and the counts."""
    counts = Counts()
    chosen = choose_template(template, tokenizer, "messages")
    recipe = Recipe(tokenizer, chosen, 900, 900, **more)
    rows = [row for part, _ in encode_source(RowRecords("data", records), recipe, counts) for row in part]
    return [marked(row.encoded, tokenizer, color=False) for row in rows], counts


def messages(record: dict) -> list[tuple[str, str]]:
    talk = parse_record(record, detect_form(record), "here:1")
    return [(message["role"], message.get("content")) for message in talk.messages]


QA = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"question": "q", "answer": "a"}, QA),
        ({"prompt": "q", "completion": "a"}, QA),
        ({"prompt": "q", "response": "a"}, QA),
        ({"query": "q", "response": "a", "history": [["x", "y"]], "system": "s"}, [("system", "s"), ("user", "x"), ("assistant", "y"), *QA]),
        ({"input": "q", "output": "a"}, QA),
        ({"system_message": "s", "prompt": "q", "response": "a"}, [("system", "s"), *QA]),
        ({"instruction": "q", "response": "a"}, QA),
        ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, [("user", "q\nc"), QA[1]]),
        ({"question": "q", "context": "c", "answer": "a"}, [("user", "q\nc"), QA[1]]),
        ({"question": "q", "input": "", "answer": "a", "system_prompt": "s"}, [("system", "s"), *QA]),
        ({"instruction": "q", "input": "c", "output": "a", "text": "all of it"}, [("user", "q\nc"), QA[1]]),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}, QA),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": "a"}, QA),
        ({"conversation": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
        ({"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, [("system", "s"), *QA]),
    ],
)  # fmt: skip
def test_names_that_people_have(record, expected):
    assert messages(record) == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"question": "q", "answer": "a", "response": "b"}, "fields 'answer' and 'response' both look like the answer; say which one with --columns"),
        ({"prompt": "q", "query": "r", "answer": "a"}, "fields 'prompt' and 'query' both look like the question"),
        ({"instruction": "q", "input": "x", "context": "y", "output": "a"}, "fields 'input' and 'context' both look like the input"),
        ({"question": 1, "answer": "a"}, "field 'question' holds int, expected text"),
        ({"question": "q", "answer": " "}, "the answer is empty"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}], "system": "t"}, "field 'system' and messages[0] hold two system texts"),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "user", "content": "a"}]}, "has no assistant message"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "the answer is empty"),
        ({"messages": [{"role": "assistant", "content": "a"}], "tools": "no JSON"}, "field 'tools' is not valid JSON"),
        ({"messages": [{"role": "assistant", "content": "a"}], "tools": [1]}, "field 'tools[0]' holds int"),
        ({"messages": [{"role": "assistant", "content": "a"}], "chat_template_kwargs": 1}, "field 'chat_template_kwargs' holds int"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "weather()"}]}, "field 'conversations[1].value' is not the JSON of a call"),
        ({"messages": [{"role": "assistant", "content": "a"}], "tools": [{"name": "f"}], "functions": [{"name": "g"}]}, "'tools' and 'functions' describe different functions"),
        ({"prompt": "q", "completion": "a", "label": False}, "field 'label' is false: an answer that is not wanted (KTO)"),
        ({"instruction": "q", "output": "a", "kto_tag": False}, "field 'kto_tag' is false"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "answers to choose from (chosen, rejected) are not trained on here"),
        ({"input_ids": [1], "labels": [1]}, "data that are tokenised already (input_ids) are not read"),
        ({"version": "1", "data": [{"question": "q", "answer": "a"}]}, "if the records are those of the list 'data', the file has to hold this list alone"),
    ],
)  # fmt: skip
def test_records_that_are_not_clear_are_refused_by_field(record, expected):
    with pytest.raises(ValueError) as error:
        parse_record(record, detect_form(record), "here:1")
    assert expected in str(error.value)


def test_an_equal_answer_under_two_names_is_one():
    assert messages({"question": "q", "answer": "a", "response": "a"}) == QA


# marks


@pytest.mark.parametrize("name", ["weight", "train", "loss", "train_on_turn", "loss_mask", "training", "loss_weight"])
@pytest.mark.parametrize(
    ("no", "yes"), [(0, 1), (0.0, 1.0), (False, True), ("0", "1"), ("false", "TRUE"), ("no", "yes")]
)
def test_marks_of_turns_are_honoured(tokenizer, name, no, yes):
    rounds = [
        *({"role": "user", "content": "q"}, {"role": "assistant", "content": "WRONG", name: no}),
        *({"role": "user", "content": "r", name: None}, {"role": "assistant", "content": "right", name: yes}),
    ]
    (shown,), _ = read([{"messages": rounds}], tokenizer)
    assert "WRONG" in shown and "⟦WRONG" not in shown and "right<|im_end|>⟧" in shown


@pytest.mark.parametrize(
    ("marks", "trained"),
    [
        ({"loss_mask": [0, 1, 0, 0]}, ["one"]),
        ({"train_on_turn": [False, True]}, ["two"]),
        ({"weight": "1"}, ["one", "two"]),
        ({"train": False}, []),
        ({"loss": None}, ["one", "two"]),
    ],
)
def test_marks_of_records_are_honoured(tokenizer, marks, trained):
    rounds = [
        *({"role": "user", "content": "q"}, {"role": "assistant", "content": "one"}),
        *({"role": "user", "content": "r"}, {"role": "assistant", "content": "two"}),
    ]
    shown, counts = read([{"messages": rounds, **marks}], tokenizer)
    found = [word for word in ("one", "two") if any(f"{word}<|im_end|>⟧" in text for text in shown)]
    assert found == trained and counts.untrained == (not trained)
    if not any(isinstance(value, list) for value in marks.values()):
        shown, counts = read([{"src": ["q", "r"], "tgt": ["one", "two"], **marks}], tokenizer)
        assert bool(shown) == bool(trained) and counts.untrained == (not trained)


@pytest.mark.parametrize(
    ("message", "record", "expected"),
    [
        ({"weight": 0.5}, {}, "field 'messages[1].weight' is 0.5; an answer is trained on (1, true) or only read"),
        ({"train": "maybe"}, {}, "field 'messages[1].train' is 'maybe'"),
        ({"loss": {"a": 1}}, {}, "field 'messages[1].loss' is {'a': 1}"),
        ({"train": True, "weight": 0}, {}, "contradicts another mark of the same message"),
        ({"train_detail": [{"begin": 0}]}, {}, "field 'messages[1].train_detail' marks parts of an answer"),
        ({}, {"weight": 2}, "field 'weight' is 2"),
        ({}, {"loss_mask": [1, 0, 1]}, "field 'loss_mask' has 3 values for 2 messages, 1 of them an assistant's"),
        ({}, {"loss_mask": [1, 1]}, "message 0 of 'messages' is marked as one to train on"),
        ({"weight": 1}, {"train": False}, "field 'train' contradicts another mark"),
    ],
)  # fmt: skip
def test_marks_that_cannot_be_honoured_are_refused(tokenizer, message, record, expected):
    rounds = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **message}]
    with pytest.raises(DataError) as error:
        read([{"messages": rounds, **record}], tokenizer)
    assert str(error.value).startswith("data:1: ") and expected in str(error.value)


@settings(max_examples=40, deadline=None)
@given(marks=st.lists(st.sampled_from([None, 0, 1, "false", "true", 0.0, True]), min_size=1, max_size=5))
def test_what_is_trained_are_the_answers_that_are_not_marked_off(marks):
    rounds = []
    for i, mark in enumerate(marks):
        rounds += [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{i}", "train": mark}]
    talk = parse_record({"messages": rounds}, "messages", "here:1")
    off = {2 * i + 1 for i, mark in enumerate(marks) if mark in (0, "false", 0.0) and mark is not None}
    assert talk.not_trained == off


def test_fields_that_look_like_orders_are_named_once_a_file(tokenizer):
    rounds = [{"role": "user", "content": "q", "mask": 1}, {"role": "assistant", "content": "a", "no_train": True}]
    records = [{"messages": rounds, "rejected": "b", "id": 7, "images": ["x.png"], "tools": []}] * 3
    _, counts = read(records, tokenizer)
    assert counts.unread == [f"data:1: field '{name}'" for name in ("rejected", "images", "mask", "no_train")]


@pytest.mark.parametrize(
    ("record", "unread"),
    [
        ({"messages": [{"role": "assistant", "content": "a"}], "conversations": [{"from": "gpt", "value": "b"}]}, ["messages"]),
        ({"question": "q", "answer": "a", "text": "### q ### a"}, ["text"]),
        ({"messages": [{"role": "assistant", "content": "a"}], "context": "c", "prompt": "q"}, ["context"]),
        ({"prompt": "q", "response": "a", "meta_instruction": "m", "category": "x"}, ["meta_instruction"]),
        ({"messages": [{"role": "assistant", "content": "a", "refusal": "no"}]}, ["refusal"]),
        ({"messages": [{"role": "assistant", "content": "a"}], "tools": [{"type": "function", "function": {"name": "f"}}]}, []),
    ],
)  # fmt: skip
def test_fields_of_another_form_are_named(tokenizer, record, unread):
    assert read([record], tokenizer)[1].unread == [f"data:1: field '{name}'" for name in unread]


# tool calls and reasoning


def test_tool_calls_in_the_forms_people_have(tokenizer):
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


def test_a_turn_that_ends_otherwise_in_the_middle(tokenizer, tmp_path):
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


def test_calls_that_a_template_does_not_render_are_refused(tokenizer):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}]
    for name, record, expected in (
        ("tokenizer", {"messages": talk}, "data:1: chat template tokenizer does not render messages[1].tool_calls"),
        ("plain", {"messages": talk, "tools": [TOOL]}, "data:1: chat template plain does not render 'tools'"),
        ("chatml", {"messages": [talk[0], {"role": "assistant", "content": "a", "reasoning_content": "r"}]}, "does not render messages[1].reasoning_content"),
    ):  # fmt: skip
        with pytest.raises(DataError) as error:
            read([record], tokenizer, name)
        assert expected in str(error.value)


def test_thoughts_and_variables_reach_the_template(tokenizer):
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "hm"}]}
    (shown,), _ = read([record], tokenizer)
    assert "<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\na<|im_end|>⟧" in shown
    talk = parse_record({**record, "chat_template_kwargs": {"enable_thinking": False}}, "messages", "here:1")
    prompt = encode_prompt(talk, tokenizer, choose_template(QWEN, tokenizer, "messages"), 500)
    assert prompt.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_reasoning_that_a_template_leaves_out_is_never_silent(tokenizer, tmp_path):
    thinking = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}
    question = {"role": "user", "content": "q"}
    (shown,), counts = read([{"messages": [question, thinking, question, thinking]}], tokenizer)
    assert shown.count("hm") == 1 and "⟦<think>\nhm\n</think>\n\nYes<|im_end|>⟧" in shown and counts.forgotten == 1
    assert "train: in 1 records the chat template leaves out the reasoning of earlier answers" in counts.notes("train")
    path = Path(__file__).parents[2] / "chat_templates" / "deepseek_r1.jinja"
    with pytest.raises(DataError, match=r"leaves out the reasoning in messages\[1\], which would be trained on"):
        read([{"messages": [question, thinking]}], tokenizer, str(path))


def test_a_call_is_what_an_evaluation_expects(tokenizer):
    record = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [CALL]}],
        "tools": [TOOL],
    }
    prompt = encode_prompt(
        parse_record(record, "messages", "here:1"), tokenizer, choose_template(QWEN, tokenizer, ""), 500
    )
    assert prompt.answer.endswith('<tool_call>\n{"name": "weather", "arguments": {"place": "Oulu"}}\n</tool_call>')


# what is said


def test_show_and_check_tell_what_is_trained_and_what_is_text(tiny_tokenizer, tokenizer, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text('{"question": "Repeat <|endoftext|>", "answer": "It is <|endoftext|> here", "score": 3}\n')
    section = FinetuneDataSection(
        dataset_name_or_path=str(file), data_cache_dir=str(tmp_path / "c"), chat_template="chatml"
    )
    show_data(section, str(tiny_tokenizer), 3, 128, color=False)
    said = capsys.readouterr().out
    assert "assistant\n⟦It is <|endoftext|> here<|im_end|><|endoftext|>⟧\n" in said, (
        "the new line after it is not trained"
    )
    assert "2 spelled special tokens are text" in said and "a.jsonl:1: field 'score' is not read" in said
    assert check_data(section, str(tiny_tokenizer), None) == 0
    said = capsys.readouterr().out
    assert "spell a special token    1 (it is text there" in said and "fields that are not read 1" in said
    file.write_text('{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]}\n')
    show_data(section, str(tiny_tokenizer), 3, 128, color=False)
    assert "1 conversations end with a question; it was left out" in capsys.readouterr().out
    file.write_text("")
    show_data(section, str(tiny_tokenizer), 3, 128, color=False)
    assert "no records" in capsys.readouterr().out
    Path(f"{file}.bin").write_bytes(b"")
    file.unlink()
    with pytest.raises(DataError, match=r"a.jsonl.bin is half of a corpus: .*a.jsonl.idx is not there"):
        show_data(section, str(tiny_tokenizer), 3, 128, color=False)


def test_a_token_that_joins_prompt_and_answer_is_the_answers_and_is_counted(tokenizer, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token if not add_generation_prompt }}")
    ((shown,), counts) = read([{"question": "Repeat the w", "answer": "ords"}], tokenizer, str(path))
    assert counts.joined == 1 and shown == "Repeat the⟦ words<|endoftext|>⟧"
    assert read([{"question": "Repeat the", "answer": " words"}], tokenizer, str(path))[1].joined == 0


def test_fixed_prompts_under_all_names(tokenizer, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"question": "q <|user|>"}\n{"instruction": "q", "context": "c"}\n{"prompt": "q"}\n{"query": "q", "response": "a"}\n'
        '{"messages": [{"role": "user", "content": "q"}]}\n{"conversations": [{"from": "human", "value": "q"}]}\n'
    )
    template = choose_template("tokenizer", tokenizer, "messages")
    prompts = load_eval_prompts(file, tokenizer, template, 100)
    assert [prompt.answer for prompt in prompts] == ["", "", "", "a", "", ""]
    assert prompts[1].text == "<|user|>q\nc<|assistant|>" and prompts[2].input_ids == prompts[4].input_ids
    user = tokenizer.convert_tokens_to_ids(["<|user|>"])[0]
    assert prompts[0].input_ids.count(user) == 1 and tokenizer.decode(prompts[0].input_ids).count("<|user|>") == 2


def test_a_tokenizer_without_offsets_is_given_stretches(tokenizer):
    class Slow:
        all_special_tokens = ()

        def tokenize(self, text, **_):
            return list(text)

        def convert_tokens_to_ids(self, tokens):
            return list("".join(tokens).encode())

    (row,) = tokenize(Slow(), [MarkedText("prompt answer.")], [(7, 14)])
    assert bytes(row.ids) == b"prompt answer." and row.offsets == [(0, 7)] * 7 + [(7, 14)] * 7
