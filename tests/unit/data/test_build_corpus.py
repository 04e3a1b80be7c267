"""Building a corpus: formats, workers, damaged files, signals."""

from __future__ import annotations

import contextlib
import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from helpers import LLM, run_program
from oarlock.data.corpus import text_chunks
from oarlock.data.corpus.notes import read_corpus_summary
from oarlock.data.files import byte_streams, text_readers
from oarlock.errors import DataError
from support.corpora import TEXTS, build, expected, read_documents, read_sequences, write_jsonl


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt-line"])
def test_all_formats_give_the_same_documents(tmp_path, tiny_tokenizer, kind):
    texts = [text for text in TEXTS if "\n" not in text] if kind == "txt-line" else TEXTS
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        write_jsonl(path, texts)
    elif kind == "jsonl.gz":
        write_jsonl(path, texts, gzip.open)
    elif kind == "jsonl.zst":
        plain = write_jsonl(tmp_path / "plain", texts)
        path.write_bytes(zstandard.compress(plain.read_bytes()))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=2)
    else:
        path = tmp_path / "data.txt"
        path.write_text("\n".join(texts), encoding="utf-8")
    prefix, report = build(tmp_path, tiny_tokenizer, path, txt_document="line")
    assert read_documents(prefix) == expected(tiny_tokenizer, texts)
    assert report.documents == len(texts)


def test_a_txt_file_is_one_document_and_a_folder_is_read_in_order(tmp_path, tiny_tokenizer):
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    (source / "a.txt").write_text("one\ntwo\n")
    (source / "sub" / "b.txt").write_text("three")
    (source / "empty.txt").write_text("")
    (source / "ignored.png").write_bytes(b"\x89PNG")
    prefix, _ = build(tmp_path, tiny_tokenizer, source)
    assert read_documents(prefix) == expected(tiny_tokenizer, ["one\ntwo\n", "three"])


def test_long_files_are_one_sequence_with_the_ids_of_the_full_text(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(byte_streams, "BLOCK_BYTES", 64)
    monkeypatch.setattr(text_chunks, "CHUNK_LENGTH", 32)
    monkeypatch.setattr(text_chunks, "CONTEXT", 16)
    text = "".join(f"line {i} 星期\n" for i in range(50))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    prefix, report = build(tmp_path, tiny_tokenizer, tmp_path / "long.txt")
    assert read_sequences(prefix) == expected(tiny_tokenizer, [text])
    assert report.documents == 1 and report.unsure_cuts == 0


def test_a_text_without_line_ends_is_split_between_characters(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(byte_streams, "BLOCK_BYTES", 16)
    monkeypatch.setattr(text_readers, "MAX_TEXT_LINE_LENGTH", 40)
    text = "星期一é" * 60
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    prefix, report = build(tmp_path, tiny_tokenizer, tmp_path / "one.txt")
    assert report.bad_lines == 0 and read_sequences(prefix) == expected(tiny_tokenizer, [text])


def test_the_corpus_does_not_depend_on_the_number_of_workers(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(byte_streams, "BLOCK_BYTES", 256)
    path = write_jsonl(tmp_path / "data.jsonl", TEXTS * 40)
    one, _ = build(tmp_path, tiny_tokenizer, path, name="one", workers=1)
    two, _ = build(tmp_path, tiny_tokenizer, path, name="two", workers=2)
    for end in (".bin", ".idx"):
        assert Path(f"{one}{end}").read_bytes() == Path(f"{two}{end}").read_bytes()


BAD = '{"text": "good"}\n{"text": 5}\nnot json\n{"other": "x"}\n["a"]\n{"text": "fine"}\n'


def test_a_bad_line_is_named_and_leaves_no_corpus(tmp_path, tiny_tokenizer):
    path = tmp_path / "bad.jsonl"
    path.write_text(BAD)
    with pytest.raises(DataError, match=r"bad.jsonl:2: field 'text' holds int, expected a string"):
        build(tmp_path, tiny_tokenizer, path)
    assert not list((tmp_path / "out").iterdir())


def test_skip_bad_counts_bad_lines(tmp_path, tiny_tokenizer):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(BAD.encode() + b'{"text": "\xff"}\n' + b'{"text": ""}\n')
    prefix, report = build(tmp_path, tiny_tokenizer, path, skip_bad=True)
    assert read_documents(prefix) == expected(tiny_tokenizer, ["good", "fine"])
    assert report.bad_lines == 5 and report.empty == 1
    assert [bad.line for bad in report.first_bad] == [2, 3, 4, 5, 7]
    assert read_corpus_summary(prefix)["bad_lines_skipped"] == 5


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("broken.jsonl.gz", b"not gzip", "damaged gz file"),
        ("broken.jsonl.zst", b"not zstd", "damaged zst file"),
        ("broken.parquet", b"PAR1 nonsense", "damaged parquet file"),
        ("latin.txt", "caf\xe9\n".encode("latin-1"), "latin.txt:1: not UTF-8"),
    ],
)
def test_damaged_files(tmp_path, tiny_tokenizer, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        build(tmp_path, tiny_tokenizer, tmp_path / name)


@pytest.mark.parametrize("end", ["gz", "zst"])
def test_truncated_files_are_refused(tmp_path, tiny_tokenizer, end):
    plain = write_jsonl(tmp_path / "plain", [f"{i} some words" for i in range(3000)]).read_bytes()
    packed = (
        gzip.compress(plain) if end == "gz" else zstandard.compress(plain[:20_000]) + zstandard.compress(plain[20_000:])
    )
    path = tmp_path / f"d.jsonl.{end}"
    path.write_bytes(packed)
    assert build(tmp_path, tiny_tokenizer, path)[1].documents == 3000
    path.write_bytes(packed[:-100])
    with pytest.raises(DataError, match=f"damaged {end} file"):
        build(tmp_path, tiny_tokenizer, path, overwrite=True)


@pytest.mark.parametrize(("name", "expected"), [("absent", "no such file or folder"), ("a.bin", "unsupported file")])
def test_wrong_inputs(tmp_path, tiny_tokenizer, name, expected):
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=expected):
        build(tmp_path, tiny_tokenizer, tmp_path / name)


def start_long_build(tmp_path, tiny_tokenizer) -> subprocess.Popen:
    """Start to build the corpus `out/c` from 40 MB of text, which takes seconds."""
    path = write_jsonl(tmp_path / "data.jsonl", ["some words to encode " * 50] * 40_000)
    words = ["-m", "oarlock", "data", "pretrain", "--input", path, "--tokenizer", tiny_tokenizer]
    words += ["--output-prefix", tmp_path / "out" / "c", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(LLM)}
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment, stderr=subprocess.DEVNULL)


def test_sigkill_leaves_no_file_that_looks_complete(tmp_path, tiny_tokenizer):
    process = start_long_build(tmp_path, tiny_tokenizer)
    children: list[str] = []
    while not (children and any((tmp_path / "out").glob("*.partial"))) and process.poll() is None:
        words = ["pgrep", "-P", str(process.pid)]
        children = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not any((tmp_path / "out" / f"c.{end}").exists() for end in ("idx", "bin"))
    assert children
    deadline = time.monotonic() + 300
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline, "its workers are still running"
        time.sleep(0.05)


def is_running(pid: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    return False


def test_sigterm_removes_the_partial_files(tmp_path, tiny_tokenizer):
    process = start_long_build(tmp_path, tiny_tokenizer)
    while not any((tmp_path / "out").glob("*.partial")) and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=300) != 0
    assert not list((tmp_path / "out").iterdir())


def test_the_command_reports_what_it_did(tmp_path, tiny_tokenizer):
    path = write_jsonl(tmp_path / "data.jsonl", TEXTS)
    result = run_program(
        "oarlock",
        "data",
        "pretrain",
        "--input",
        str(path),
        "--tokenizer",
        str(tiny_tokenizer),
        "--output-prefix",
        str(tmp_path / "c"),
    )
    assert result.returncode == 0, result.stderr
    assert "5 documents" in result.stdout and "MB/s" in result.stdout
