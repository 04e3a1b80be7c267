"""Text files in the formats that users have."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.data.files import byte_streams, text_readers
from oarlock.data.records.record_stream import FileRecords
from oarlock.errors import DataError
from support.text_files import read, source

SKIPPABLE = b"\x5a\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"\x28\xb5\x2f\xfdabc"


def long_window(data: bytes) -> bytes:
    """Compress as `zstd --long=31` does: no size in the header, and a window of 2 GB."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True, hash_log=12, chain_log=12, ldm_hash_log=12)  # fmt: skip
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


def halves(data: bytes, compress) -> bytes:
    return compress(data[: len(data) // 2]) + compress(data[len(data) // 2 :])


COMPRESSIONS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".gz (two members)": lambda data: halves(data, gzip.compress),
    ".zst": zstandard.compress,
    ".zst (frames)": lambda data: SKIPPABLE + halves(data, zstandard.compress) + SKIPPABLE,
}


def _jsonl(texts, end):
    return "".join(json.dumps({"text": text}) + end for text in texts)


def _json(texts, end):
    return json.dumps([{"text": text} for text in texts], indent=1, ensure_ascii=False).replace("\n", end)


def _table(texts, end, separator):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator, lineterminator=end)
    writer.writerows([["n", "text"], *([str(i), text] for i, text in enumerate(texts))])
    return file.getvalue()


FORMS = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": lambda texts, end: _table(texts, end, ","),
    "tsv": lambda texts, end: _table(texts, end, "\t"),
}
# Every UTF-8 character except NUL, which is not text, and a lone CR, which ends a line in spreadsheets.
TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff"), max_size=40).map(
        lambda text: text.replace("@", "\r\n")
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=120, deadline=None)
@given(
    texts=TEXTS,
    form=st.sampled_from(sorted(FORMS)),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
    compression=st.sampled_from(sorted(COMPRESSIONS)),
    block=st.sampled_from([1, 7, 64, 1 << 20]),
)
def test_blocks_compression_line_ends_and_bom_do_not_change_documents(
    tmp_path_factory, texts, form, end, mark, compression, block
):
    content = (codecs.BOM_UTF8 if mark else b"") + FORMS[form](texts, end).encode()
    path = tmp_path_factory.mktemp("d") / f"d.{form}{compression.split(' ')[0]}"
    path.write_bytes(COMPRESSIONS[compression](content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_streams, "BLOCK_BYTES", block)
        assert read(source(path)) == (texts, [])
        records = [item for batch in FileRecords.detect(path).batches() for _, item in batch.items]
    assert [record["text"] for record in records] == texts


@settings(max_examples=80, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), min_size=1, max_size=300),
    mark=st.booleans(),
    compression=st.sampled_from(sorted(COMPRESSIONS)),
    block=st.sampled_from([1, 7, 64, 1 << 20]),
    longest=st.sampled_from([5, 1 << 24]),
)
def test_a_text_file_is_one_document(tmp_path_factory, text, mark, compression, block, longest):
    path = tmp_path_factory.mktemp("d") / f"d.txt{compression.split(' ')[0]}"
    path.write_bytes(COMPRESSIONS[compression]((codecs.BOM_UTF8 if mark else b"") + text.encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_streams, "BLOCK_BYTES", block)
        patch.setattr(text_readers, "MAX_TEXT_LINE_LENGTH", longest)
        assert read(source(path)) == ([text], [])
        parts = [item for batch in FileRecords.detect(path).batches() for _, item in batch.items]
        lines, _ = read(source(path), txt_document="line")
    assert "".join(part.text for part in parts) == text and [part.ends for part in parts].count(True) == 1
    assert lines == [line.removesuffix("\r") for line in text.split("\n") if line.encode().strip()]


def test_zstd_long_windows_are_read(tmp_path):
    path = tmp_path / "d.jsonl.zst"
    path.write_bytes(long_window(b'{"text": "one"}\n' * 3))
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << 31
    assert read(source(path)) == (["one"] * 3, [])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_other_encodings_are_named(tmp_path, name, encoding):
    text = '[{"text": "one"}]\n' if name == "a.json" else '{"text": "one"}\n' if name == "a.jsonl" else "text\none\n"
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / name).write_bytes(mark + text.encode(encoding))
    kind = "UTF-32" if encoding == "utf-32" else "UTF-16"
    for attempt in (lambda: read(source(tmp_path / name)), lambda: list(FileRecords.detect(tmp_path / name).batches())):
        with pytest.raises(
            DataError, match=rf"{name}:1: the text is {kind}, expected UTF-8; convert it: iconv -f {kind}"
        ):
            attempt()


def test_nul_bytes_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntw\0o\nthree\n")
    assert read(source(tmp_path / "a.txt")) == (
        ["one\nthree\n"],
        [f"{tmp_path}/a.txt:2: contains NUL bytes: not text, or UTF-16 (convert it: iconv -f UTF-16 -t UTF-8)"],
    )
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16-le"))
    documents, bad = read(source(tmp_path / "a.jsonl"))
    assert not documents and "contains NUL bytes" in bad[0]


def test_a_duplicate_field_is_a_bad_line(tmp_path):
    twice = '{"text": "a", "x": [{"b": 1, "b": 2}]}'
    (tmp_path / "a.jsonl").write_text(f'{twice}\n{{"text": "b"}}\n{{\n')
    documents, bad = read(source(tmp_path / "a.jsonl"))
    assert documents == ["b"] and bad[0] == f"{tmp_path}/a.jsonl:1: field 'b' appears twice in one object"
    assert "a.jsonl:3: not valid JSON" in bad[1] and "an object over several lines?" in bad[1]
    (tmp_path / "b.json").write_text(f'[{twice},\n{{"text": "b"}}]')
    documents, bad = read(source(tmp_path / "b.json"))
    assert documents == ["b"] and bad == [f"{tmp_path}/b.json:1: field 'b' appears twice in one object"]


def test_byte_order_marks_at_line_starts_are_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\ufefftwo".encode())
    assert read(source(tmp_path / "a.txt"), txt_document="line") == (["one", "two"], [])


def test_half_a_surrogate_pair_is_a_bad_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a"}\n{"text": "b \\ud83d"}\n{"text": "\\ud83d\\ude00", "x": "\\udc00"}\n'
    )
    assert read(source(tmp_path / "a.jsonl")) == (
        ["a", "😀"],
        [f"{tmp_path}/a.jsonl:2: field 'text' contains a lone surrogate (\\ud83d)"],
    )
    for name, text in (("b.jsonl", '{"messages": [{"role": "user", "content": "\\ude00"}]}'),
                       ("b.json", '[\n{"messages": [{"role": "user", "content": "\\ude00"}]}]')):  # fmt: skip
        (tmp_path / name).write_text(text)
        ((line, problem),) = [item for batch in FileRecords.detect(tmp_path / name).batches() for item in batch.items]
        assert line == (1 if name == "b.jsonl" else 2)
        assert str(problem) == ("field 'messages[0].content' contains a lone surrogate (\\ude00)")


@pytest.mark.parametrize(
    ("content", "documents", "bad"),
    [
        ('a,text\n1,one\n2\n3,"th\nree"\n', ["one", "th\nree"], ["3: the row has 1 fields, the header names 2"]),
        ('a,text\n1,"o"ne\n2,two\n', ["two"], ["2: wrong quotes: ',' expected after '\"'"]),
        ('a,text\n1,"o\n"ne\n2,two\n', ["two"], ["2: wrong quotes (lines 2 to 3): ',' expected after '\"'"]),
        ('text\n\nhe said "hi"\n', ['he said "hi"'], []),
        ("a,b\n1,2\n", [], ["2: column 'text' is missing (columns: 'a', 'b'), expected a string"]),
        ("text,\nx,y\n", ["x"], []),
    ],
)
def test_tables(tmp_path, content, documents, bad):
    (tmp_path / "a.csv").write_text(content)
    assert read(source(tmp_path / "a.csv")) == (documents, [f"{tmp_path}/a.csv:{line}" for line in bad])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('a,text\n1,one\n2,"two\n3,three\n', "a.csv:3: a quote that opens in this row is not closed"),
        ("text,a,text\n1,2,3\n", "a.csv:1: the header names 'text' more than once"),
        ("prompt;text\n1;2\n", "uses the separator ',', this one seems to use ';'"),
        ("\n\n", "no header"),
        ('text\n"a\nb\0c"\n', "a.csv:3: contains NUL bytes.*within a row that begins on line 2"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read(source(tmp_path / "a.csv"))


def test_content_after_the_end_of_a_list_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}]\n[{"text": "b"}]\n')
    with pytest.raises(DataError, match=r"a.json:2: more text after the end of the list"):
        read(source(tmp_path / "a.json"))
