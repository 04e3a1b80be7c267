"""Text files -> .bin/.idx -> samples."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from fast_dataindex import helpers
from hypothesis import given, settings
from hypothesis import strategies as st
from paddlenlp.data.causal_dataset import build_train_valid_test_datasets
from paddlenlp.data.indexed_dataset import MMapIndexedDataset

from helpers import LLM, run_program
from oarlock.data.corpus import text_chunks
from oarlock.data.corpus.blend import BlendedDataset, ConcatenatedDataset
from oarlock.data.corpus.build_corpus import BuildOptions, build_corpus
from oarlock.data.corpus.dataset import Corpus, PretrainDataset, parse_input, sample_index
from oarlock.data.corpus.index_format import CorpusWriter, check_corpus, token_dtype
from oarlock.data.corpus.notes import corpus_summary
from oarlock.data.files import byte_streams, text_readers
from oarlock.data.tokenizers.load import load_encoder
from oarlock.errors import DataError

TEXTS = ["Repeat the words.", "water\nfire", "星期一 后一天", "a" * 300, "x"]


def build(tmp_path: Path, tokenizer: Path, *inputs: Path, name: str = "c", **options):
    prefix = tmp_path / "out" / name
    inputs = inputs or (tmp_path,)
    report = build_corpus(BuildOptions(tuple(map(str, inputs)), str(tokenizer), str(prefix), **options))
    return prefix, report


def documents(prefix: Path) -> list[list[int]]:
    """Token ids of every document, as PaddleNLP's own reader sees them."""
    data = MMapIndexedDataset(str(prefix), skip_warmup=True)
    bounds = data.doc_idx
    return [
        np.concatenate([data[int(s)] for s in range(first, last)]).tolist()
        for first, last in itertools.pairwise(bounds)
    ]


def sequences(prefix: Path) -> list[list[int]]:
    """Every sequence of the index, by the same reader; each has to be a document."""
    data = MMapIndexedDataset(str(prefix), skip_warmup=True)
    assert data.doc_idx.tolist() == list(range(len(data) + 1))
    return [data[i].tolist() for i in range(len(data))]


def expected(tokenizer: Path, texts: list[str]) -> list[list[int]]:
    encoder = load_encoder(str(tokenizer))
    return [[*row.tolist(), encoder.eos_id] for row in encoder.encode(texts)]


def write_jsonl(path: Path, texts: list[str], opener=open) -> Path:
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt-line"])
def test_every_format_gives_the_same_documents(tmp_path, tiny_tokenizer, kind):
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
    assert documents(prefix) == expected(tiny_tokenizer, texts)
    assert report.documents == len(texts)


def test_a_txt_file_is_one_document_and_a_folder_is_read_in_order(tmp_path, tiny_tokenizer):
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    (source / "a.txt").write_text("one\ntwo\n")
    (source / "sub" / "b.txt").write_text("three")
    (source / "empty.txt").write_text("")
    (source / "ignored.png").write_bytes(b"\x89PNG")
    prefix, _ = build(tmp_path, tiny_tokenizer, source)
    assert documents(prefix) == expected(tiny_tokenizer, ["one\ntwo\n", "three"])


def test_long_files_are_one_sequence_with_the_ids_of_the_whole(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(byte_streams, "BLOCK_BYTES", 64)
    monkeypatch.setattr(text_chunks, "PIECE", 32)
    monkeypatch.setattr(text_chunks, "CONTEXT", 16)
    text = "".join(f"line {i} 星期\n" for i in range(50))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    prefix, report = build(tmp_path, tiny_tokenizer, tmp_path / "long.txt")
    assert sequences(prefix) == expected(tiny_tokenizer, [text])
    assert report.documents == 1 and report.unsure_cuts == 0


def test_a_text_without_line_ends_is_read_between_characters(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(byte_streams, "BLOCK_BYTES", 16)
    monkeypatch.setattr(text_readers, "LONGEST_TEXT_LINE", 40)
    text = "星期一é" * 60
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    prefix, report = build(tmp_path, tiny_tokenizer, tmp_path / "one.txt")
    assert report.bad_lines == 0 and sequences(prefix) == expected(tiny_tokenizer, [text])


def test_workers_give_the_same_corpus(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(byte_streams, "BLOCK_BYTES", 256)
    path = write_jsonl(tmp_path / "data.jsonl", TEXTS * 40)
    one, _ = build(tmp_path, tiny_tokenizer, path, name="one", workers=1)
    two, _ = build(tmp_path, tiny_tokenizer, path, name="two", workers=2)
    for end in (".bin", ".idx"):
        assert Path(f"{one}{end}").read_bytes() == Path(f"{two}{end}").read_bytes()


BAD = '{"text": "good"}\n{"text": 5}\nnot json\n{"other": "x"}\n["a"]\n{"text": "fine"}\n'


def test_a_bad_line_names_file_and_line_and_nothing_is_left(tmp_path, tiny_tokenizer):
    path = tmp_path / "bad.jsonl"
    path.write_text(BAD)
    with pytest.raises(DataError, match=r"bad.jsonl:2: field 'text' holds int, expected text"):
        build(tmp_path, tiny_tokenizer, path)
    assert not list((tmp_path / "out").iterdir())


def test_skip_bad_counts_them(tmp_path, tiny_tokenizer):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(BAD.encode() + b'{"text": "\xff"}\n' + b'{"text": ""}\n')
    prefix, report = build(tmp_path, tiny_tokenizer, path, skip_bad=True)
    assert documents(prefix) == expected(tiny_tokenizer, ["good", "fine"])
    assert report.bad_lines == 5 and report.empty == 1
    assert [bad.line for bad in report.first_bad] == [2, 3, 4, 5, 7]
    assert corpus_summary(prefix)["bad_lines_skipped"] == 5


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
def test_files_cut_in_the_middle_are_not_taken_for_whole(tmp_path, tiny_tokenizer, end):
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


@pytest.mark.parametrize(
    ("name", "expected"), [("absent", "no such file or folder"), ("a.bin", "unknown kind of file")]
)
def test_wrong_inputs(tmp_path, tiny_tokenizer, name, expected):
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=expected):
        build(tmp_path, tiny_tokenizer, tmp_path / name)


def test_sigkill_leaves_no_file_that_looks_whole(tmp_path, tiny_tokenizer):
    path = write_jsonl(tmp_path / "data.jsonl", ["some words to encode " * 50] * 40_000)
    prefix = tmp_path / "out" / "c"
    words = [
        "-m",
        "oarlock",
        "data",
        "pretrain",
        "--input",
        path,
        "--tokenizer",
        tiny_tokenizer,
        "--output-prefix",
        prefix,
    ]
    process = subprocess.Popen(
        [sys.executable, *map(str, words), "--workers", "2"],
        env={**os.environ, "PYTHONPATH": str(LLM)},
        stderr=subprocess.DEVNULL,
    )
    children: list[str] = []
    while not (children and any((tmp_path / "out").glob("*.partial"))) and process.poll() is None:
        words = ["pgrep", "-P", str(process.pid)]
        children = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path(f"{prefix}.idx").exists() and not Path(f"{prefix}.bin").exists()
    assert children
    deadline = time.monotonic() + 300
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline, "its workers go on"
        time.sleep(0.05)


def is_running(pid: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    return False


def test_sigterm_removes_the_partial_files(tmp_path, tiny_tokenizer):
    path = write_jsonl(tmp_path / "data.jsonl", ["some words to encode " * 50] * 40_000)
    prefix = tmp_path / "out" / "c"
    words = [
        "-m",
        "oarlock",
        "data",
        "pretrain",
        "--input",
        path,
        "--tokenizer",
        tiny_tokenizer,
        "--output-prefix",
        prefix,
    ]
    process = subprocess.Popen(
        [sys.executable, *map(str, words), "--workers", "2"],
        env={**os.environ, "PYTHONPATH": str(LLM)},
        stderr=subprocess.DEVNULL,
    )
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


# the format


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 60_000), min_size=1, max_size=30), st.booleans()), min_size=1, max_size=20
    ),
    wide=st.booleans(),
)
def test_written_corpora_read_back_with_paddlenlp(tmp_path_factory, rows, wide):
    prefix = tmp_path_factory.mktemp("corpus") / "c"
    rows[-1] = rows[-1][0], True
    whole, parts = [], []
    with CorpusWriter(prefix, 100_000 if wide else 60_001) as writer:
        for first in range(0, len(rows), 3):
            batch = rows[first : first + 3]
            ids = np.concatenate([np.asarray(ids) for ids, _ in batch])
            writer.add(ids, np.asarray([len(ids) for ids, _ in batch]), np.asarray([ends for _, ends in batch]))
        writer.finish({})
    for ids, ends in rows:
        parts += ids
        if ends:
            whole, parts = [*whole, parts], []
    check_corpus(prefix)
    assert sequences(prefix) == whole
    assert corpus_summary(prefix)["largest_id"] == max(max(ids) for ids, _ in rows)


def test_dtype_follows_paddlenlps_rule():
    assert token_dtype(65_499) == np.uint16 and token_dtype(65_500) == np.int32


def make_corpus(prefix: Path, lengths: list[int], start: int = 0) -> Path:
    with CorpusWriter(prefix, 60_000) as writer:
        first = start
        for length in lengths:
            writer.add(np.arange(first, first + length), np.asarray([length]), np.asarray([True]))
            first += length
        writer.finish({})
    return prefix


def test_damaged_corpora_are_refused(tmp_path):
    prefix = make_corpus(tmp_path / "c", [5, 6])
    data, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    whole = data.read_bytes()
    data.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"c.bin: 20 bytes, its index expects 22"):
        Corpus.open(str(prefix))
    data.write_bytes(whole)
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(DataError, match="damaged"):
        Corpus.open(str(prefix))
    index.write_bytes(b"something else")
    with pytest.raises(DataError, match="not an index file"):
        Corpus.open(str(prefix))


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40), seq_length=st.integers(1, 40))
def test_sample_index_equals_fast_dataindex(sizes, seq_length):
    array = np.asarray(sizes, np.int32)
    total = int(array.sum())
    theirs = helpers.build_sample_idx(array, np.arange(len(sizes), dtype=np.int32), seq_length, 1, total)
    assert np.array_equal(sample_index(array, seq_length), theirs)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20), seq_length=st.integers(1, 30), seed=st.integers(0, 5)
)
def test_samples_are_the_joined_documents(tmp_path_factory, lengths, seq_length, seed):
    prefix = make_corpus(tmp_path_factory.mktemp("corpus") / "c", lengths)
    corpus = Corpus.open(str(prefix))
    dataset = PretrainDataset(corpus, range(len(lengths)), seq_length, seed)
    joined = np.concatenate([corpus.documents[int(i)] for i in dataset.doc_idx])
    assert len(dataset) == (len(joined) - 1) // seq_length
    for i in range(len(dataset)):
        assert dataset[i]["text"].tolist() == joined[i * seq_length : (i + 1) * seq_length + 1].tolist()


def test_paddlenlps_own_dataset_reads_our_corpus(tmp_path, tiny_tokenizer):
    """CausalDataset (what PaddleNLP's run_pretrain uses) trains on the same tokens."""
    prefix, _ = build(tmp_path, tiny_tokenizer, write_jsonl(tmp_path / "d.jsonl", TEXTS * 20))
    train, valid, _ = build_train_valid_test_datasets([str(prefix)], "mmap", "90,10,0", [4, 2, 0], 16, 1, True)
    ours = set(np.concatenate(documents(prefix)).tolist())
    assert len(train[0]["text"]) == 17 and set(train[0]["text"].tolist()) <= ours and len(valid) >= 2


def test_splits_are_paddlenlps(tmp_path):
    from paddlenlp.data.causal_dataset import get_train_valid_test_split_

    corpus = Corpus.open(str(make_corpus(tmp_path / "c", [3] * 37)))
    for text, shares in (
        ("949,50,1", (0.949, 0.05, 0.001)),
        ("8,1,1", (0.8, 0.1, 0.1)),
        ("1,1,1", (1 / 3, 1 / 3, 1 / 3)),
    ):
        theirs = get_train_valid_test_split_(text, 37)
        ours = corpus.split(shares)
        assert [ours[0].start, *(part.stop for part in ours)] == theirs


def test_a_changed_corpus_is_another_one(tmp_path):
    """PaddleNLP caches the index under the prefix; a rebuilt corpus then trains on the old one's positions."""
    first = Corpus.open(str(make_corpus(tmp_path / "c", [5, 6])))
    again = Corpus.open(str(make_corpus(tmp_path / "c", [5, 6])))
    other = Corpus.open(str(make_corpus(tmp_path / "c", [6, 5])))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_legacy_corpora_are_read(tmp_path):
    ids = np.arange(20, dtype=np.uint16)
    np.save(tmp_path / "old_ids.npy", ids)
    np.savez(
        tmp_path / "old_idx.npz",
        lens=np.asarray([8, 12], np.int32),
        sents=np.asarray([0, 1, 2]),
        docs=np.asarray([0, 1, 2]),
    )
    corpus = Corpus.open(str(tmp_path / "old"))
    dataset = PretrainDataset(corpus, range(2), 6, seed=1)
    joined = np.concatenate([corpus.documents[int(i)] for i in dataset.doc_idx])
    assert dataset[1]["text"].tolist() == joined[6:13].tolist()


def test_legacy_corpora_do_not_run_pickles(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    np.savez(tmp_path / "old_idx.npz", lens=np.asarray([1]), docs=np.asarray([0, 1]))
    (tmp_path / "old_ids.npy").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="not a readable corpus"):
        Corpus.open(str(tmp_path / "old"))
    assert not (tmp_path / "exploded").exists()


# blending


def test_blend_keeps_its_weights_and_does_not_depend_on_its_length(tmp_path):
    datasets = [
        PretrainDataset(Corpus.open(str(make_corpus(tmp_path / name, [41], start))), range(1), 4, 0)
        for name, start in (("a", 0), ("b", 1000))
    ]
    blend = BlendedDataset(datasets, [3.0, 1.0], seed=0)
    early = [int(blend[i]["text"][0]) for i in range(40)]
    assert sum(value >= 1000 for value in early) == 10
    blend[200_000]
    assert [int(blend[i]["text"][0]) for i in range(40)] == early
    firsts = [v for v in (int(blend[i]["text"][0]) for i in range(400)) if v >= 1000]
    assert sorted(firsts[:10]) == sorted(firsts[10:20]) == [1000 + 4 * i for i in range(10)]  # epochs of b


def test_concatenated_dataset(tmp_path):
    datasets = [
        PretrainDataset(Corpus.open(str(make_corpus(tmp_path / name, [9], start))), range(1), 4, 0)
        for name, start in (("a", 0), ("b", 100))
    ]
    joined = ConcatenatedDataset(datasets, ["a", "b"])
    assert [int(joined[i]["text"][0]) for i in range(len(joined))] == [0, 4, 100, 104]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{0}/absent", "neither a folder"),
        ("{0}/empty", "no .bin/.idx corpus"),
        ("1 {0}/a x {0}/a", "weight 'x'"),
        ("all {0}/a 1 {0}/b", "each of them `all`"),
        ("1 {0}/a 2", "nor a blend"),
    ],
)
def test_wrong_input_dirs(tmp_path, text, expected):
    make_corpus(tmp_path / "a", [5])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=expected):
        parse_input(text.format(tmp_path))


def test_input_dirs(tmp_path):
    a, b = make_corpus(tmp_path / "a", [5]), make_corpus(tmp_path / "b", [5])
    assert parse_input(str(a)) == [(1.0, str(a))]
    assert parse_input(str(tmp_path)) == [(1.0, str(a)), (1.0, str(b))]
    assert parse_input(f"0.3 {a} 0.7 {b}") == [(0.3, str(a)), (0.7, str(b))]
