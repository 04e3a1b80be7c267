"""Columns that hold the fields of a record."""

from __future__ import annotations

import csv
import json

import pytest

from oarlock.data.examples.dataset import load_finetune_data
from oarlock.data.records.columns import Columns
from oarlock.errors import ConfigError, DataError
from support.finetune_files import section, write

# columns

MAPPED = {"q": "question 1", "a": "answer 1", "note": "x"}


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_columns_of_every_kind_of_file(tmp_path, tokenizer, kind):
    path, rows = (
        tmp_path / f"d.{kind}",
        [{"q": f"question {i}", "a": f'an, "answer"\n{i}', "text": "x"} for i in range(4)],
    )
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    plain = write(tmp_path / "plain.jsonl", [{"src": row["q"], "tgt": row["a"]} for row in rows])
    found = load_finetune_data(section(tmp_path, path, columns="prompt=q,response=a"), tokenizer).train
    assert list(found.examples) == list(load_finetune_data(section(tmp_path, plain), tokenizer).train.examples)
    with pytest.raises(DataError, match=r"no column 'b' \(--columns\); the columns are 'q', 'a', 'text'"):
        load_finetune_data(section(tmp_path, path, columns="prompt=q,response=b"), tokenizer)
    with pytest.raises(DataError, match=r"no record has 'c' \(--columns\); the columns are 'q', 'a', 'text'"):
        load_finetune_data(section(tmp_path, path, columns="prompt=q,response=a,system=c"), tokenizer)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("prompt=q,response=a", {"src": "q", "tgt": "a"}),
        ("question=q,answer=a,system=note", {"src": "q", "tgt": "a", "system": "note"}),
        ("instruction=q,output=a,input=note", {"instruction": "q", "output": "a", "input": "note"}),
        ("prompt=q,response=a,context=note", {"instruction": "q", "output": "a", "input": "note"}),
        ('"prompt=my, q",response=a', {"src": "my, q", "tgt": "a"}),
        ("messages=chat", {"messages": "chat"}),
        ("text=q", {"text": "q"}),
    ],
)
def test_what_columns_become(text, fields):
    assert {field: column for field, (column, _) in Columns.parse(text).column_of.items()} == fields


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt", "'prompt' is not field=column"),
        ("promt=q,response=a", "unknown field 'promt'; known are prompt"),
        ("prompt=q,instruction=b,response=a", "'instruction' is given twice"),
        ("prompt=q", "name the columns of question and answer"),
    ],
)
def test_wrong_columns(text, message):
    with pytest.raises(ConfigError, match=message):
        Columns.parse(text)


def test_unmapped_mark_columns_are_reported(tmp_path, tokenizer, capsys):
    path = tmp_path / "d.csv"
    path.write_text("q,a,train\nx,yes,\ny,WRONG,false\nz,true,1\n")
    load_finetune_data(section(tmp_path, path, columns="prompt=q,response=a"), tokenizer)
    assert "d.csv:2: column 'train' is ignored: --columns does not name it" in capsys.readouterr().out
    data = load_finetune_data(section(tmp_path, path, columns="prompt=q,response=a,weight=train"), tokenizer)
    assert [data.train.examples.locate(i).rpartition(":")[2] for i in range(len(data.train.examples))] == ["2", "4"]


def test_lists_in_cells(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with open(tmp_path / "d.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages"], [json.dumps(chat)]])
    plain = write(tmp_path / "plain.jsonl", [{"messages": chat}])
    found = [
        load_finetune_data(section(tmp_path, path), tokenizer).train.examples[0] for path in (tmp_path / "d.csv", plain)
    ]
    assert found[0] == found[1]
    (tmp_path / "d.csv").write_text('messages\n"[{""role"": "\n')
    with pytest.raises(DataError, match=r"d.csv:2: column 'messages': not valid JSON"):
        load_finetune_data(section(tmp_path, tmp_path / "d.csv"), tokenizer)


def test_plain_text_has_no_columns(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a.txt: plain text has no columns"):
        load_finetune_data(section(tmp_path, tmp_path / "a.txt", columns="text=x"), tokenizer)
