"""Untrusted data: records that are too deep or too long and files that are not regular are named with their line,
cheaply.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard

from oarlock.data.corpus.dataset import Corpus
from oarlock.data.corpus.text_chunks import TextSplitter
from oarlock.data.examples.eval_prompts import load_eval_prompts
from oarlock.data.files import json_lists, tables, text_readers
from oarlock.data.files.byte_streams import open_source
from oarlock.data.files.find_files import LeftOut, find_sources
from oarlock.data.files.json_text import MAX_DEPTH, parse_line
from oarlock.data.files.text_readers import BadLine, parse_batch, read_batches
from oarlock.data.records.columns import Columns
from oarlock.data.records.dataset_resolver import find_records
from oarlock.data.records.messages import MessageError, normalize_message
from oarlock.errors import ConfigError, DataError

DEEP = "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)


def texts(path: Path) -> list[str]:
    """Texts of a file, and the messages about the others."""
    return [
        str(piece) if isinstance(piece, BadLine) else piece.text
        for source in find_sources([str(path)], LeftOut())
        for batch in read_batches(source, TextSplitter(lambda texts: [[] for _ in texts]))
        for piece in parse_batch(batch, "text", "line")
    ]


def items(path: Path) -> list[tuple[int, object]]:
    return [item for source in find_records(str(path)).train for batch in source.batches() for item in batch.items]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (f'{{"text": "a", "more": {DEEP}}}', f"objects and lists more than {MAX_DEPTH} levels deep"),
        ('{"text": "a", "more": ' + "9" * 1001 + "}", "an integer of 1,001 digits"),
        ('{"text": "a", "text": "b"}', "field 'text' appears twice in one object"),
        ('{"text": "\\ud800"}', "a lone surrogate"),
        ("{" + ", ".join(f'"k{i}": 1' for i in range(50_000)) + ', "k7": 2}', "field 'k7' appears twice"),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_a_wrong_record_is_named_and_the_others_are_read(tmp_path, form, record, reason):
    good = '{"text": "good", "score": NaN, "id": 123456789012345678901234567890}'
    path = tmp_path / f"a.{form}"
    path.write_text(f"{good}\n{record}\n{good}\n" if form == "jsonl" else f"[{good},\n{record},\n{good}]")
    found = texts(path)
    assert found[::2] == ["good", "good"]
    assert found[1].startswith(f"{path}:2: ") and reason in found[1]
    (_, first), (line, wrong), (_, last) = items(path)
    assert first["text"] == last["text"] == "good"
    assert line == 2 and isinstance(wrong, ValueError) and reason in str(wrong)


def test_a_too_deeply_nested_list_fails_at_once(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"},\n' + "[" * 200_000)
    with pytest.raises(DataError, match=r"a.json:2: objects and lists nested too deep"):
        texts(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_a_line_longer_than_any_record_is_refused(tmp_path, monkeypatch, name):
    for module in (json_lists, text_readers, tables):
        monkeypatch.setattr(module, "MAX_RECORD_LENGTH", 1 << 21)
    start = {"a.jsonl": '{"text": "x"}\n"', "a.json": '[{"text": "x"},\n"'}.get(name, "text\n")
    (tmp_path / name).write_text(start + "x" * (5 << 20))
    with pytest.raises(DataError, match=rf"{name}:2: "):
        texts(tmp_path / name)


@pytest.mark.parametrize("packed", [zstandard.compress, gzip.compress])
def test_decompression_is_bounded(tmp_path, packed):
    path = tmp_path / "a.jsonl"
    path.write_bytes(packed(bytes(1 << 27)))
    assert path.stat().st_size < 1 << 20
    (source,) = find_sources([str(path)], LeftOut())
    tracemalloc.start()
    with open_source(source) as stream:
        stream.read()
        stream.read()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 200 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"a.jsonl:1: a line of more than 67,108,864 bytes"):
        texts(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


def test_pipes_are_refused_without_waiting(tmp_path):
    for name in ("a.jsonl", "a.json", "a.txt", "a.parquet", "train.csv"):
        os.mkfifo(tmp_path / name)
        for read in (lambda path: find_sources([path], LeftOut()), find_records):
            with pytest.raises(DataError, match=rf"{name}: a pipe, not a regular file"):
                read(str(tmp_path / name))
    with pytest.raises(DataError, match=r"--eval_prompts .*a.txt: a pipe"):
        load_eval_prompts(tmp_path / "a.txt", None, None, 10)


def test_cells_and_arguments_are_parsed_as_strictly_as_records(tmp_path):
    (tmp_path / "a.csv").write_text(f'messages\n"{DEEP}"\n"[{{}}, {{"a"": 1, ""a"": 2}}]"\n'.replace('{"a', '{""a'))
    assert [str(item) for _, item in items(tmp_path / "a.csv")] == [
        f"column 'messages': objects and lists more than {MAX_DEPTH} levels deep",
        "column 'messages': field 'a' appears twice in one object",
    ]
    for arguments, reason in ((DEEP, "levels deep"), ('{"a": 1, "a": 2}', "appears twice"), ("{", "is not valid JSON")):
        message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        with pytest.raises(MessageError, match=reason):
            normalize_message(message, "messages[0]")


@pytest.mark.parametrize("text", ["prompt=a\nb,response=c", "prompt=a,response=" + "x" * 200_000])
def test_unsplittable_csv_columns_are_refused(text):
    limit = csv.field_size_limit(1 << 17)
    try:
        with pytest.raises(ConfigError, match="--columns"):
            Columns.parse(text)
    finally:
        csv.field_size_limit(limit)


def test_nesting_up_to_the_limit_and_brackets_in_strings_are_accepted(tmp_path):
    assert parse_line("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert parse_line(json.dumps({"a": "[{" * 500})) == {"a": "[{" * 500}


def save_dataset(folder: Path, splits: dict[str, str]) -> None:
    """A saved dataset whose state.json lists these files."""
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    for name, file in splits.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "state.json").write_text(json.dumps({"_data_files": [{"filename": file}]}))


@pytest.mark.parametrize(
    ("splits", "reason"),
    [
        ({"train": "/etc/hostname"}, r"train/state.json: '/etc/hostname' is not the name of a file"),
        ({"train": "../a.arrow"}, r"'../a.arrow' is not the name"),
        ({"../other": "a.arrow"}, r"dataset_dict.json: '../other' is not the name"),
    ],
)
def test_saved_datasets_may_name_only_their_own_files(tmp_path, splits, reason):
    folder = tmp_path / "set"
    folder.mkdir()
    save_dataset(folder, splits)
    with pytest.raises(DataError, match=reason):
        find_records(str(folder))


def npy(header: str) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("lens", "reason"),
    [
        (np.asarray([1.5, 18.5]), "lens is not a flat array of whole numbers"),
        (np.asarray([[8], [12]]), "lens is not a flat array"),
        (np.asarray([-8, 28]), "a sequence has -8 to 28 tokens"),
        (np.asarray([1 << 40, 20 - (1 << 40)]), "a sequence has -"),
        (np.asarray([8, 11]), "20 tokens, its index expects 19"),
        (np.zeros(100_000, np.int64), "too many for its tokens"),
        (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999,), }"), "lens is not a flat array"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"), "lens is not a flat array"),
        (npy("(" * 100), "not a readable corpus"),
        (b"no array", "not a readable corpus"),
    ],
)  # fmt: skip
def test_legacy_corpora_allocate_only_what_they_contain(tmp_path, lens, reason):
    import zipfile

    np.save(tmp_path / "c_ids.npy", np.arange(20, dtype=np.uint16))
    if isinstance(lens, bytes):
        with zipfile.ZipFile(tmp_path / "c_idx.npz", "w") as archive:
            archive.writestr("lens.npy", lens)
    else:
        np.savez_compressed(tmp_path / "c_idx.npz", lens=lens)
    with pytest.raises(DataError, match=reason):
        Corpus.open(str(tmp_path / "c"))
