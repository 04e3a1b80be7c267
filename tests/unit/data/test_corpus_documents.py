"""A document is one sequence of a corpus including its end token; corpora of other tools are read by documents."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from paddlenlp.data.indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder

from oarlock.data.corpus import index_format
from oarlock.data.corpus.build_corpus import BuildOptions, build_corpus, build_from_sources
from oarlock.data.corpus.dataset import Corpus, PretrainDataset
from oarlock.data.corpus.documents import ends_with
from oarlock.data.corpus.index_format import CorpusWriter
from oarlock.data.corpus.notes import read_corpus_summary
from oarlock.data.embedded.prepare import _remove_other_corpora
from oarlock.data.embedded.stdlib_text import find_stdlib_sources
from oarlock.data.examples.collate import PretrainCollator
from oarlock.data.files.find_files import LeftOut, find_sources
from oarlock.data.tokenizers.load import load_encoder
from oarlock.errors import DataError
from oarlock.formats.sealed import SEAL, seal_text

END = 9


def test_a_real_corpus_of_many_sizes(tmp_path, tiny_tokenizer):
    """Files of 0 bytes to 1.6 MB: the ids of the full text, exactly one end token, in order, also for PaddleNLP's
    reader.
    """
    library = find_stdlib_sources()[::12]
    texts = [text for one in library if (text := one.path.read_bytes().decode("utf-8-sig"))]
    folder = tmp_path / "in"
    folder.mkdir()
    large = "".join(texts)[:1_600_000]
    (folder / "a.txt.gz").write_bytes(gzip.compress(large.encode()))
    (folder / "b.jsonl").write_text(json.dumps({"text": large[:300_000]}) + "\n" + json.dumps({"text": "x"}) + "\n")
    (folder / "c.txt").write_text("")
    (folder / "d.csv").write_text('text\n"one\r\n""two"""\n""\n', newline="")
    sources = library + find_sources([str(folder)], LeftOut())
    options = BuildOptions((), str(tiny_tokenizer), str(tmp_path / "c"), workers=2)
    report = build_from_sources(sources, options)
    expected = [*texts, large, large[:300_000], "x", 'one\r\n"two"']
    encoder = load_encoder(str(tiny_tokenizer))
    data = MMapIndexedDataset(str(tmp_path / "c"), skip_warmup=True)
    assert len(data) == len(expected) and data.doc_idx.tolist() == list(range(len(expected) + 1))
    for i, ids in enumerate(encoder.encode(expected)):
        assert np.array_equal(data[i][:-1], ids) and data[i][-1] == encoder.eos_id, i
    corpus = Corpus.open(str(tmp_path / "c"))
    assert np.array_equal(corpus.documents.sizes, data.sizes) and ends_with(corpus.documents, encoder.eos_id) == 1
    empty = sum(not one.size for one in sources) + 1  # including c.txt, the library's file, and the second row of d.csv
    assert (report.documents, report.tokens, report.empty) == (len(expected), int(data.sizes.sum()), empty)
    about = read_corpus_summary(tmp_path / "c")
    assert about["format"] == index_format.FORMAT and about["unsure_cuts"] == 0
    assert [about[name] for name in ("documents", "tokens", "files", "empty_texts", "bad_lines_skipped")] == [
        report.documents,
        report.tokens,
        len(sources),
        empty,
        0,
    ]


def test_an_existing_corpus_is_not_overwritten(tmp_path, tiny_tokenizer):
    (tmp_path / "a.txt").write_text("one two")
    options = BuildOptions((str(tmp_path / "a.txt"),), str(tiny_tokenizer), str(tmp_path / "c"))
    build_corpus(options)
    before = (tmp_path / "c.bin").read_bytes()
    (tmp_path / "a.txt").write_text("three")
    with pytest.raises(DataError, match=r"c.bin, .*c.idx, .*c.json: already there.*--overwrite"):
        build_corpus(options)
    (tmp_path / "c.idx").unlink()  # half of a document is one too
    with pytest.raises(DataError, match="already there"):
        build_corpus(options)
    assert (tmp_path / "c.bin").read_bytes() == before
    build_corpus(BuildOptions(options.inputs, options.tokenizer, options.output_prefix, overwrite=True))
    assert (tmp_path / "c.bin").read_bytes() != before and Corpus.open(str(tmp_path / "c")).num_documents == 1


def test_skipped_files_are_counted_in_the_summary(tmp_path, tiny_tokenizer):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.txt", "b.bz2", "c.bz2", ".d.txt"):
        (folder / name).write_text("text")
    report = build_corpus(BuildOptions((str(folder),), str(tiny_tokenizer), str(tmp_path / "c")))
    assert read_corpus_summary(tmp_path / "c")["files_left_out"] == {
        "compressed as .bz2; gz and zst are read": 2,
        "hidden": 1,
    }
    said = "\n".join(report.describe("c"))
    assert "1 documents" in said and "from 1 file(s)" in said and f"{folder}/b.bz2: compressed as .bz2" in said


def test_a_document_too_long_for_the_index_is_refused(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(index_format, "MAX_SEQUENCE_TOKENS", 20)
    (tmp_path / "a.txt").write_text("one two three " * 30)
    options = BuildOptions((str(tmp_path / "a.txt"),), str(tiny_tokenizer), str(tmp_path / "out" / "c"))
    with pytest.raises(DataError, match=r"a.txt: .*a document of more than 20 tokens can't be one sequence.*split the"):
        build_corpus(options)
    assert not list((tmp_path / "out").iterdir())
    with CorpusWriter(tmp_path / "parts", 100) as writer:
        writer.add(np.arange(15), np.asarray([5, 10]), np.asarray([True, False]))
        with pytest.raises(DataError, match="more than 20 tokens"):
            writer.add(np.arange(15), np.asarray([15]), np.asarray([True]))


def test_the_embedded_corpus_of_an_earlier_version_is_not_blended_with_the_new_one(tmp_path, capsys):
    for name in ("stdlib-new", "stdlib-old"):
        for end in (".bin", ".idx", ".json"):
            (tmp_path / f"{name}{end}").touch()
    (tmp_path / "stdlib-notes.txt").touch()
    _remove_other_corpora(tmp_path / "stdlib-new")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"stdlib-new.bin", "stdlib-new.idx", "stdlib-new.json", "stdlib-notes.txt"}
    assert "stdlib-old.bin: removed, of another tokenizer or an earlier version" in capsys.readouterr().out


def test_negative_ids_are_refused(tmp_path):
    dataset = PretrainDataset(Corpus.open(str(sequences(tmp_path / "c", [[[1, -2, 3, 4]]], np.int16))), range(1), 2, 0)
    with pytest.raises(DataError, match="token id -2, which is never valid"):
        PretrainCollator(10)([dataset[0]])


# corpora of other tools


def sequences(prefix: Path, rows: list[list[list[int]]], dtype=np.int32) -> Path:
    """A corpus in which documents have several sequences, as PaddleNLP's own builder writes it."""
    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in rows:
        for ids in document:
            builder.add_item(np.asarray(ids))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


ROWS = [[[1, 2, 3], [4, END]], [[5, END]], [[6], [7], [8, END]], [[9, 9, END]]]
WHOLE = [[1, 2, 3, 4, END], [5, END], [6, 7, 8, END], [9, 9, END]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_documents_of_several_sequences_are_joined(tmp_path, dtype, capsys):
    corpus = Corpus.open(str(sequences(tmp_path / "c", ROWS, dtype)))
    assert [corpus.documents[i].tolist() for i in range(corpus.num_documents)] == WHOLE
    assert corpus.documents.get(0, offset=2, length=2)[0].tolist() == [3, 4]
    assert "4 documents in 7 sequences, joined" in capsys.readouterr().out
    train, held_out, _ = corpus.split((0.5, 0.5, 0.0))
    assert (train, held_out) == (range(2), range(2, 4)), "between documents"
    dataset = PretrainDataset(corpus, range(4), 3, seed=0)
    joined = np.concatenate([WHOLE[i] for i in dataset.doc_idx])
    assert [dataset[i]["text"].tolist() for i in range(len(dataset))] == [
        joined[i : i + 4].tolist() for i in range(0, len(joined) - 3, 3)
    ]
    flat = Corpus.open(str(sequences(tmp_path / "flat", [[row] for row in WHOLE])))
    assert flat.fingerprint != corpus.fingerprint, "a run that started with sequences must not resume silently"


def test_a_corpus_of_the_earlier_builder_is_reported(tmp_path, capsys):
    prefix = sequences(tmp_path / "c", [[[1, 2], [END]], [[3, 4, END]]])
    (tmp_path / "c.json").write_text(json.dumps({"documents": 2, "tokens": 6, "tokenizer_fingerprint": "abc"}))
    corpus = Corpus.open(str(prefix))
    assert [corpus.documents[i].tolist() for i in range(2)] == [[1, 2, END], [3, 4, END]]
    said = capsys.readouterr().out
    assert "built by an earlier version" in said and "joined from 3 parts" in said and "--overwrite" in said


def test_an_index_with_missing_or_wrong_document_bounds_is_refused(tmp_path):
    prefix = sequences(tmp_path / "c", [[[1, 2]], [[3]], [[4, 5]]])
    index = bytearray((tmp_path / "c.idx").read_bytes())
    bounds = 4 * 8
    wrong = index[:-bounds] + struct.pack("<4q", 0, 1, 2, 2)
    (tmp_path / "c.idx").write_bytes(wrong)
    with pytest.raises(DataError, match=r"documents end at sequence 2 of 3"):
        Corpus.open(str(prefix))
    none = index[:-bounds] + struct.pack("<q", 0)  # only the first: no document ever ended
    struct.pack_into("<Q", none, 26, 1)
    (tmp_path / "c.idx").write_bytes(none)
    assert Corpus.open(str(prefix)).num_documents == 3


def test_unsupported_indices_are_named(tmp_path):
    prefix = sequences(tmp_path / "c", [[[1, 2]], [[3]]])
    index = (tmp_path / "c.idx").read_bytes()
    for content, message in (
        (b"TNTIDX\x00\x00" + index[8:], "Megatron's old index"),
        (index[:17] + b"\x07" + index[18:], "dtype code 7; known are version 1 and whole numbers"),
        (index + b"\x00\x01", "other modes"),
    ):
        (tmp_path / "c.idx").write_bytes(content)
        with pytest.raises(DataError, match=message):
            Corpus.open(str(prefix))


def test_files_of_two_builds_are_refused(tmp_path):
    with CorpusWriter(tmp_path / "c", 100) as writer:
        writer.add(np.arange(15), np.asarray([5, 10]), np.asarray([True, True]))
        writer.finish({})
    about = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(seal_text({n: v for n, v in about.items() if n != SEAL} | {"documents": 3}))
    with pytest.raises(DataError, match=r"2 documents, but c.json says 3; these files are from different builds"):
        Corpus.open(str(tmp_path / "c"))


@pytest.mark.parametrize("docs", [[0, 2, 3], [2, 3], None])
def test_legacy_corpora_are_read_by_documents(tmp_path, docs):
    np.save(tmp_path / "old_ids.npy", np.asarray([1, 2, 3, 4, 5, 6], np.uint16))
    more = {} if docs is None else {"docs": np.asarray(docs)}
    np.savez(tmp_path / "old_idx.npz", lens=np.asarray([2, 2, 2], np.int32), **more)
    corpus = Corpus.open(str(tmp_path / "old"))
    found = [corpus.documents[i].tolist() for i in range(corpus.num_documents)]
    assert found == ([[1, 2], [3, 4], [5, 6]] if docs is None else [[1, 2, 3, 4], [5, 6]])
    assert ends_with(corpus.documents, END) == 0 and ends_with(corpus.documents, 6) == 1 / len(found)
