"""Data files of users: JSON Lines, lists, tables and text, plain or compressed, read for pretraining and fine-tuning."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import zstandard
from harness import Harness

from oarlock.data.corpus.text_chunks import TextSplitter
from oarlock.data.files.find_files import LeftOut, find_sources
from oarlock.data.files.text_readers import parse_batch, read_batches
from oarlock.data.records.conversations import PlainText, detect_form, parse_record
from oarlock.data.records.dataset_resolver import find_records
from oarlock.errors import OarlockError

_NAMES = ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz", "a.json.zst", "train.jsonl", "a.parquet")
_MOST = 2000  # number of records of an input that are read


def target(data: bytes, folder: Path) -> None:
    if not data:
        return
    name, content = _NAMES[data[0] % len(_NAMES)], data[1:]
    path = folder / name
    try:
        path.write_bytes(content)
        problems = [problem for read in (_pretraining, _records) if (problem := _read(read, path)) is not None]
    finally:
        path.unlink()
    if problems:
        raise problems[0]


def _read(read, path: Path) -> OarlockError | None:
    try:
        read(path)
    except OarlockError as error:
        assert "\x00" not in str(error) and path.name in str(error), error
        return error
    return None


def _pretraining(path: Path) -> None:
    for source in find_sources([str(path)], LeftOut()):
        for batch in read_batches(source, TextSplitter(lambda text: len(text))):
            for piece in parse_batch(batch, "text", "line"):
                str(getattr(piece, "text", piece)).encode()


def _records(path: Path) -> None:
    count = 0
    for source in find_records(str(path)).train:
        for batch in source.batches():
            for line, item in batch.items:
                count += 1
                if count > _MOST or isinstance(item, (ValueError, PlainText)):
                    continue
                try:
                    parse_record(item, detect_form(item), f"{path}:{line}")
                except ValueError as error:  # reported with its line, or skipped
                    assert str(error)


def seeds() -> list[bytes]:
    call = {"function": {"name": "f", "arguments": '{"a": [1]}'}}
    records = [
        {"text": "a\u00e9b"},
        {"src": ["q", "r"], "tgt": ["a", "b"]},
        {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [call]}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f"}'}]},
        {"question": "q", "answer": "a", "tools": '[{"type": "function"}]'},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    listed = json.dumps(records, indent=1).encode()
    table = b'text,messages\nab,"[{""role"": ""user"", ""content"": ""q""}]"\n"c\nd",\n'
    contents = [
        lines,
        listed,
        table,
        table.replace(b",", b"\t"),
        b"some text\r\nmore\n",
        gzip.compress(lines),
        zstandard.compress(listed),
        lines,
        b"PAR1" + lines,
    ]
    return [bytes([i]) + content for i, content in enumerate(contents)]


HARNESS = Harness(
    target,
    seeds,
    tokens=[
        b"\\ud800",
        b"\\u0000",
        b"\0",
        b"[" * 120,
        b'{"a":' * 120,
        b"9" * 1100,
        b"NaN",
        b"1e999",
        b'"',
        b'""',
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\r\n",
        b'"role": "system"',
        b'"tool_calls": [',
        b'"arguments": "{"',
        b'"messages": "[{"',
        b"\x28\xb5\x2f\xfd",
        b"\x1f\x8b",
        b"PAR1",
    ],
)
