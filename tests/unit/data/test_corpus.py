"""The format of a corpus, its samples and splits, and blends."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from fast_dataindex import helpers
from hypothesis import given, settings
from hypothesis import strategies as st
from paddlenlp.data.causal_dataset import build_train_valid_test_datasets

from oarlock.data.corpus.blend import BlendedDataset, ConcatenatedDataset
from oarlock.data.corpus.dataset import Corpus, PretrainDataset, parse_input, sample_index
from oarlock.data.corpus.index_format import CorpusWriter, check_corpus, choose_token_dtype
from oarlock.data.corpus.notes import read_corpus_summary
from oarlock.errors import DataError
from support.corpora import TEXTS, build, read_documents, read_sequences, write_jsonl

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
    assert read_sequences(prefix) == whole
    assert read_corpus_summary(prefix)["largest_id"] == max(max(ids) for ids, _ in rows)


def test_dtype_follows_paddlenlp():
    assert choose_token_dtype(65_499) == np.uint16 and choose_token_dtype(65_500) == np.int32


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
def test_the_sample_index_equals_fast_dataindex(sizes, seq_length):
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
    ours = set(np.concatenate(read_documents(prefix)).tolist())
    assert len(train[0]["text"]) == 17 and set(train[0]["text"].tolist()) <= ours and len(valid) >= 2


def test_splits_equal_paddlenlp(tmp_path):
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


def test_a_rebuilt_corpus_gets_a_new_index(tmp_path):
    """PaddleNLP caches the index by prefix, and would train a rebuilt corpus with the positions of the old one."""
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
        ("1 {0}/a 2", "is not a blend"),
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
