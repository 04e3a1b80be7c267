"""Common field names and forms of records, and the reports on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from oarlock.config.finetune import FinetuneDataSection
from oarlock.data.examples.eval_prompts import load_eval_prompts
from oarlock.data.examples.inspect import check_data
from oarlock.data.examples.marked_text import MarkedText
from oarlock.data.examples.preview import show_data
from oarlock.data.records.conversations import detect_form, parse_record
from oarlock.data.templates.chat_template import choose_template
from oarlock.data.tokenizers.offsets import tokenize
from oarlock.errors import DataError
from support.records import read, read_messages

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
def test_common_field_names(record, expected):
    assert read_messages(record) == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"question": "q", "answer": "a", "response": "b"}, "fields 'answer' and 'response' both look like the answer; choose one with --columns"),
        ({"prompt": "q", "query": "r", "answer": "a"}, "fields 'prompt' and 'query' both look like the question"),
        ({"instruction": "q", "input": "x", "context": "y", "output": "a"}, "fields 'input' and 'context' both look like the input"),
        ({"question": 1, "answer": "a"}, "field 'question' holds int, expected a string"),
        ({"question": "q", "answer": " "}, "the answer is empty"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}], "system": "t"}, "field 'system' and messages[0] hold different system prompts"),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "user", "content": "a"}]}, "has no assistant message"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "the answer is empty"),
        ({"messages": [{"role": "assistant", "content": "a"}], "tools": "no JSON"}, "field 'tools' is not valid JSON"),
        ({"messages": [{"role": "assistant", "content": "a"}], "tools": [1]}, "field 'tools[0]' holds int"),
        ({"messages": [{"role": "assistant", "content": "a"}], "chat_template_kwargs": 1}, "field 'chat_template_kwargs' holds int"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "weather()"}]}, "field 'conversations[1].value' is not a tool call in JSON"),
        ({"messages": [{"role": "assistant", "content": "a"}], "tools": [{"name": "f"}], "functions": [{"name": "g"}]}, "'tools' and 'functions' describe different functions"),
        ({"prompt": "q", "completion": "a", "label": False}, "field 'label' is false: KTO marks this answer as rejected"),
        ({"instruction": "q", "output": "a", "kto_tag": False}, "field 'kto_tag' is false"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference data (chosen, rejected) are not supported"),
        ({"input_ids": [1], "labels": [1]}, "tokenized data (input_ids) are not supported"),
        ({"version": "1", "data": [{"question": "q", "answer": "a"}]}, "if the records are in the list 'data', the file must contain only this list"),
    ],
)  # fmt: skip
def test_ambiguous_records_are_refused_by_field(record, expected):
    with pytest.raises(ValueError) as error:
        parse_record(record, detect_form(record), "here:1")
    assert expected in str(error.value)


def test_equal_answers_under_two_names_count_once():
    assert read_messages({"question": "q", "answer": "a", "response": "a"}) == QA


# reports


def test_show_and_check_report_trained_tokens_and_text(tiny_tokenizer, tokenizer, tmp_path, capsys):
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
    assert "2 special tokens spelled as text" in said and "a.jsonl:1: field 'score' is ignored" in said
    assert check_data(section, str(tiny_tokenizer), None) == 0
    said = capsys.readouterr().out
    assert "spell a special token    1 (as text" in said and "fields not read          1" in said
    file.write_text('{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]}\n')
    show_data(section, str(tiny_tokenizer), 3, 128, color=False)
    assert "1 conversations end with a question, which was dropped" in capsys.readouterr().out
    file.write_text("")
    show_data(section, str(tiny_tokenizer), 3, 128, color=False)
    assert "no records" in capsys.readouterr().out
    Path(f"{file}.bin").write_bytes(b"")
    file.unlink()
    with pytest.raises(DataError, match=r"a.jsonl.bin is half of a corpus: .*a.jsonl.idx is missing"):
        show_data(section, str(tiny_tokenizer), 3, 128, color=False)


def test_a_token_across_prompt_and_answer_belongs_to_the_answer(tokenizer, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token if not add_generation_prompt }}")
    ((shown,), counts) = read([{"question": "Repeat the w", "answer": "ords"}], tokenizer, str(path))
    assert counts.joined == 1 and shown == "Repeat the⟦ words<|endoftext|>⟧"
    assert read([{"question": "Repeat the", "answer": " words"}], tokenizer, str(path))[1].joined == 0


def test_fixed_prompts_accept_all_field_names(tokenizer, tmp_path):
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


def test_a_tokenizer_without_offsets_gets_text_spans(tokenizer):
    class Slow:
        all_special_tokens = ()

        def tokenize(self, text, **_):
            return list(text)

        def convert_tokens_to_ids(self, tokens):
            return list("".join(tokens).encode())

    (row,) = tokenize(Slow(), [MarkedText("prompt answer.")], [(7, 14)])
    assert bytes(row.ids) == b"prompt answer." and row.offsets == [(0, 7)] * 7 + [(7, 14)] * 7
