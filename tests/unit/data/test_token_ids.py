"""Ids beyond the vocabulary are found when data is opened, or reported by the process that reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from oarlock.data.corpus.dataset import Corpus, check_token_ids
from oarlock.data.corpus.index_format import CorpusWriter, check_corpus, token_ids
from oarlock.data.corpus.notes import read_corpus_summary
from oarlock.data.corpus.order import MAX_EPOCHS, SampleOrder, iterate_micro_batches
from oarlock.data.examples.collate import check_ids
from oarlock.data.examples.encode import Row
from oarlock.data.examples.example_cache import ExampleWriter, StoredExamples, is_complete
from oarlock.data.examples.labels import Encoded, EvalPrompt
from oarlock.data.examples.worker_errors import (
    ErrorCatchingCollator,
    ErrorCatchingDataset,
    ErrorCatchingSampler,
    raise_worker_errors,
)
from oarlock.data.records.counts import Counts
from oarlock.data.tokenizers import token_ids as looked_at
from oarlock.data.tokenizers.token_ids import check_range
from oarlock.errors import DataError, TrainingError


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A corpus and a folder of examples, both with ids below 100."""
    folder = tmp_path_factory.mktemp("data")
    with CorpusWriter(folder / "c", 100_000) as writer:
        writer.add(np.arange(90), np.asarray([40, 50]), np.asarray([True, True]))
        writer.finish({"tokenizer": "x", "tokenizer_fingerprint": "ids-0"})
    with ExampleWriter(folder / "examples", 100) as writer:
        writer.begin_source()
        writer.add([Row(Encoded([1, 2, 3], [1, 2], 1, 2, False), 1, EvalPrompt([1], "a", "b")) for _ in range(4)])
        writer.finish(Counts(records=4))
    return folder


@pytest.fixture
def data(written, tmp_path) -> Path:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("wrong", [512, 4_000_000, -1])
def test_a_corpus_with_ids_beyond_the_vocabulary_is_refused(data, wrong):
    corpus = Corpus.open(str(data / "c"))
    check_token_ids([corpus], 512)
    ids = np.fromfile(data / "c.bin", np.int32)
    ids[50] = wrong
    ids.tofile(data / "c.bin")
    with pytest.raises(DataError, match=rf"c.bin: token 50 is id {wrong:,}, but the model's vocabulary has 512 rows"):
        check_token_ids([corpus], 512)


def test_a_large_file_is_sampled_throughout(monkeypatch):
    monkeypatch.setattr(looked_at, "_CHECKED_BYTES", 1 << 12)
    monkeypatch.setattr(looked_at, "_BLOCK", 1 << 8)
    ids = np.zeros(1 << 16, np.uint16)
    for at in (0, len(ids) - 1):
        ids[at] = 600
        with pytest.raises(DataError, match=f"token {at:,} is id 600"):
            check_range(ids, 512, "x")
        ids[at] = 0
    check_range(ids, 512, "x")
    check_range(ids[:0], 512, "x")


def test_the_first_wrong_id_is_named():
    ids = np.asarray([0, 511, 512, -1], np.int64)
    with pytest.raises(DataError, match="token 2 is id 512"):
        check_range(ids, 512, "x")
    with pytest.raises(DataError, match="id 512"):
        check_ids(ids[:3], 512)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text.replace('"largest_id": 89', '"largest_id": 88'), "checksum does not match"),
        (lambda text: json.dumps(json.loads(text)), "does not end with a checksum"),
        (lambda text: text.replace('"format": 3', '"format": 2'), "checksum does not match"),
        (lambda text: '{"format": 2, "largest_id": "many"}', "largest_id must be an integer"),
        (lambda text: '{"format": 2, "documents": -1}', "documents"),
    ],
)
def test_altered_notes_of_a_corpus_are_ignored(data, change, expected):
    path = data / "c.json"
    assert read_corpus_summary(data / "c")["largest_id"] == 89
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=expected):
        Corpus.open(str(data / "c"))


@pytest.mark.parametrize("content", ['{"text": "x"}\n{"text": "y"}\n', '{"format": "text"}', "[1]", "\0"])
def test_another_file_with_the_name_of_a_note_is_ignored(data, content):
    """For example the text from which another program built the corpus."""
    (data / "c.json").write_text(content)
    assert read_corpus_summary(data / "c") == {} and Corpus.open(str(data / "c")).num_documents == 2


def test_every_bit_flip_of_an_index_is_detected_or_harmless(data):
    """Sizes and offsets of all sequences are checked; documents are checked when they are joined."""
    path, expected = data / "c.idx", token_ids(data / "c").tolist()
    content = path.read_bytes()
    found = 0
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << (at % 8)
        path.write_bytes(changed)
        try:
            corpus = Corpus.open(str(data / "c"))
            assert [int(i) for n in range(len(corpus.documents)) for i in corpus.documents[n]] == expected
        except DataError:
            found += 1
    assert found == len(content)


@pytest.mark.parametrize("size", [0, 89, 91])
def test_a_loss_mask_of_the_wrong_length_is_refused(data, size):
    (data / "c.lsm").write_bytes(b"\1" * size)
    with pytest.raises(DataError, match=f"c.lsm: {size} bytes"):
        check_corpus(data / "c")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokens.bin", lambda b: b[:-2] + b"\x09\x00"),
        ("tokens.bin", lambda b: b[:-2]),
        ("rows.bin", lambda b: b"\xff" * 8 + b[8:]),
        ("rows.bin", lambda b: b"\x7f" * 16 + b[16:]),
        ("runs.bin", lambda b: b""),
        ("about.json", lambda b: b.replace(b'"num_examples": 4', b'"num_examples": 3')),
        ("about.json", lambda b: b"{}"),
        ("prompts.jsonl", lambda b: b + b"x"),
    ],
)
def test_damaged_examples_are_rebuilt(data, name, change):
    """Ids above the recorded maximum, offsets out of order, sizes that do not fit."""
    folder = data / "examples"
    assert is_complete(folder) and not is_complete(data / "none")
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    assert not is_complete(folder)
    with pytest.raises(DataError):
        StoredExamples(folder).check()


# errors in worker processes


class Samples:
    """Numbers; samples 3 and 4 are faulty."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        if index == 3:
            raise DataError("x.jsonl:3: wrong")
        return {4: {}}[index] if index > 4 else index


def batches(*rows):
    collate = ErrorCatchingCollator(lambda samples: {"ids": np.asarray(samples) // (1 if 2 not in samples else 0)})
    dataset = ErrorCatchingDataset(Samples())
    return raise_worker_errors(collate([dataset[i] for i in row]) for row in ErrorCatchingSampler(rows))


def test_reader_failures_are_raised_as_errors():
    assert [batch["ids"].tolist() for batch in batches([0, 1], [1, 0])] == [[0, 1], [1, 0]]
    found = batches([0, 1], [0, 3])
    assert next(found)["ids"].tolist() == [0, 1]
    with pytest.raises(DataError, match=r"^x.jsonl:3: wrong$"):
        next(found)
    with pytest.raises(DataError, match=r"^sample 5 can't be read: KeyError: 5 \(test_token_ids.py:\d+\)$"):
        list(batches([0, 5]))


def test_a_failing_sampler_raises_an_error():
    """In Paddle's own thread it would hang."""
    order = SampleOrder(4, seed=0)
    sampler = ErrorCatchingSampler(iterate_micro_batches(order, 4 * MAX_EPOCHS - 2, 4 * MAX_EPOCHS + 2, 2, 1, 1, 0))
    dataset = ErrorCatchingDataset(list(range(4)))
    found = raise_worker_errors(
        ErrorCatchingCollator(lambda rows: {"ids": rows})([dataset[i] for i in row]) for row in sampler
    )
    assert len(next(found)["ids"]) == 2
    with pytest.raises(DataError, match=r"^the next samples can't be chosen: ValueError: Seed"):
        next(found)


def test_a_killed_reader_raises_an_error():
    def gone():
        yield {"ids": np.zeros(1)}
        raise SystemError("(Fatal) Blocking queue is killed because the data reader raises an exception.")

    with pytest.raises(TrainingError, match=r"a process that reads data .* ended unexpectedly"):
        list(raise_worker_errors(gone()))
