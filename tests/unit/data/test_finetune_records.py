"""Fine-tuning records in each form, and records that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from oarlock.data.embedded.tokenizer import ASSISTANT, EOS, USER
from oarlock.data.examples.encode import Counts, EncodingSettings, encode_source
from oarlock.data.examples.preview import mark_trained
from oarlock.data.records.conversations import parse_record
from oarlock.data.records.record_stream import FileRecords
from oarlock.data.templates.chat_template import choose_template
from oarlock.errors import DataError
from support.finetune_files import write


def read(path: Path, tokenizer, form="auto", skip_bad=False, name="tokenizer", src_length=400, tgt_length=400):
    """Rows and counts of a file; the tokenizer's template renders <|user|>q<|assistant|>a<|endoftext|>."""
    template = choose_template(name, tokenizer, "src_tgt")
    counts = Counts()
    settings = EncodingSettings(tokenizer, template, src_length, tgt_length, form, skip_bad)
    return [row for rows, _ in encode_source(FileRecords.detect(path), settings, counts) for row in rows], counts


def shown(row, tokenizer) -> str:
    return mark_trained(row.encoded, tokenizer, color=False)


# records


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"src": "q", "tgt": "a"}, f"{USER}q{ASSISTANT}⟦a{EOS}⟧"),
        ({"src": ["q", "r"], "tgt": ["a", "b"]}, f"{USER}q{ASSISTANT}⟦a{EOS}⟧{USER}r{ASSISTANT}⟦b{EOS}⟧"),
        ({"instruction": "do", "input": "x", "output": "y"}, f"{USER}do\nx{ASSISTANT}⟦y{EOS}⟧"),
        ({"instruction": "do", "output": "y", "history": [["q", "a"]]}, f"{USER}q{ASSISTANT}⟦a{EOS}⟧{USER}do{ASSISTANT}⟦y{EOS}⟧"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, f"{USER}s{USER}q{ASSISTANT}⟦a{EOS}⟧"),
        ({"messages": [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "q"), ("assistant", "a"))]}, f"{USER}s{USER}q{ASSISTANT}⟦a{EOS}⟧"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]}, f"{USER}q{ASSISTANT}⟦a{EOS}⟧"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0}, {"role": "assistant", "content": "b"}]}, f"{ASSISTANT}a{EOS}{ASSISTANT}⟦b{EOS}⟧"),
        ({"text": "a whole text"}, f"a⟦ whole text{EOS}⟧"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_list", [False, True])
def test_record_forms_are_detected_from_their_fields(tmp_path, tokenizer, record, expected, as_list):
    (row,), counts = read(write(tmp_path / "a.json", [record], as_list), tokenizer)
    assert shown(row, tokenizer) == expected and counts.records == 1


def test_a_final_question_without_an_answer_is_dropped_and_counted(tmp_path, tokenizer):
    messages = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "more"}]
    (row,), counts = read(write(tmp_path / "a.jsonl", [{"conversations": messages}]), tokenizer)
    assert shown(row, tokenizer) == f"{USER}q{ASSISTANT}⟦a{EOS}⟧" and counts.unanswered == 1


def test_an_alpaca_prompt_keeps_instruction_and_input():
    record = parse_record({"instruction": "do", "input": "x", "output": "y"}, "alpaca", "here:1")
    assert record.messages[0] == {"role": "user", "content": "do\nx", "instruction": "do", "input": "x"}


def test_every_token_of_a_long_text_is_trained_once(tmp_path, tokenizer):
    text = "\n".join(f"line {i} of a longer text" for i in range(40))
    (tmp_path / "a.txt").write_text(text)
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    rows, counts = read(tmp_path / "a.txt", tokenizer, src_length=10, tgt_length=21)
    assert counts.records == 1 and counts.truncated == 0 and len(rows) > 10
    examples = [row.encoded.to_example() for row in rows]
    assert [label for example in examples for label in example.labels] == whole[1:]
    assert max(len(example.input_ids) for example in examples) == 30


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"src": "a"}', "field 'tgt' is missing"),
        ('{"src": 1, "tgt": "b"}', "field 'src' holds int"),
        ('{"src": ["a", "b"], "tgt": ["c"]}', "2 rounds in 'src' but 1 in 'tgt'"),
        ('{"src": [], "tgt": []}', "field 'src' must be a text or a non-empty list of texts"),
        ('{"src": "a", "tgt": "  "}', "the answer is empty"),
        ('{"src": "a", "tgt"', "not valid JSON"),
        ("[1]", "expected an object, got list"),
    ],
)
def test_wrong_records_name_file_line_and_field(tmp_path, tokenizer, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_text('{"src": "a", "tgt": "b"}\n' + line + "\n")
    with pytest.raises(DataError) as error:
        read(path, tokenizer)
    assert str(error.value).startswith(f"{path}:2: {expected}")
    rows, counts = read(path, tokenizer, skip_bad=True)
    assert len(rows) == 1 and counts.bad == 1 and counts.first_bad[0].startswith(f"{path}:2: {expected}")


@pytest.mark.parametrize(
    ("form", "record", "expected"),
    [
        ("messages", {}, "field 'messages' is missing, expected a non-empty list of messages"),
        ("messages", {"messages": "x"}, "field 'messages' holds str, expected a non-empty list of messages"),
        ("messages", {"messages": ["x"]}, "field 'messages[0]' holds str, expected an object"),
        ("messages", {"messages": [{"role": "user", "content": 1}]}, "field 'messages[0].content' holds int, expected a string"),
        ("messages", {"messages": [{"role": "assistant", "content": None}]}, "field 'messages[0].content' is null"),
        ("messages", {"messages": [{"role": "robot", "content": "x"}]}, "field 'messages[0].role' is 'robot'; known roles are"),
        ("messages", {"messages": [{"role": "user", "content": "x"}]}, "has no assistant message"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "has parts that are not text"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "field 'conversations[0].content' is missing"),
        ("alpaca", {"instruction": "x", "output": "y", "history": ["q"]}, "field 'history[0]' must be a pair"),
        ("text", {"text": ""}, "field 'text' is empty"),
        ("auto", {"q": 1}, "unknown form of record ('q'); known are src/tgt (src_tgt), instruction/output (alpaca)"),
    ],
)  # fmt: skip
def test_wrong_records_of_each_form(tmp_path, tokenizer, form, record, expected):
    path = write(tmp_path / "a.jsonl", [record])
    with pytest.raises(DataError) as error:
        read(path, tokenizer, form)
    assert str(error.value).startswith(f"{path}:1: ") and expected in str(error.value)


def test_a_template_that_refuses_a_record_names_it(tmp_path, tokenizer):
    path = write(
        tmp_path / "a.jsonl", [{"messages": [{"role": "assistant", "content": "a"}]}, {"src": "a", "tgt": "b"}]
    )
    with pytest.raises(
        DataError, match=r"a.jsonl:1: chat template llama2 refuses these messages: an answer must follow"
    ):
        read(path, tokenizer, name="llama2")
    rows, counts = read(path, tokenizer, name="llama2", skip_bad=True)
    assert (len(rows), counts.bad) == (0, 2)  # the second one has another form
