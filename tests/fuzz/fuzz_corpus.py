"""Corpora (.json, .idx and .bin, or _ids.npy and _idx.npz) with arbitrary content, opened and read completely."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import numpy as np
from harness import Harness

from oarlock.data.corpus.dataset import Corpus, PretrainDataset, find_largest_known_id
from oarlock.data.corpus.index_format import CorpusWriter

_BETWEEN = b"\0\0==\0\0"  # the files of an input
_NEW, _OLD = (".json", ".idx", ".bin", ".lsm"), ("_ids.npy", "_idx.npz")
_MOST_ITEMS = 64


def target(data: bytes, folder: Path) -> None:
    parts = data.split(_BETWEEN)
    for path in folder.iterdir():
        path.unlink()
    for end, content in zip(_NEW if len(parts) > len(_OLD) else _OLD, parts, strict=False):
        (folder / f"c{end}").write_bytes(content)
    corpus = Corpus.open(str(folder / "c"))
    find_largest_known_id([corpus])
    for split in corpus.split((0.8, 0.1, 0.1)):
        dataset = PretrainDataset(corpus, split, 4, seed=1)
        for index in range(min(len(dataset), _MOST_ITEMS)):
            assert dataset[index]["text"].shape == (5,)
    for document in range(min(len(corpus.documents), _MOST_ITEMS)):
        assert len(corpus.documents[document]) == corpus.documents.sizes[document]


def seeds() -> list[bytes]:
    found = []
    with tempfile.TemporaryDirectory() as name:
        for vocab_size, sizes in ((100, [3, 1, 9]), (70_000, [5, 5])):
            prefix = Path(name) / "c"
            with CorpusWriter(prefix, vocab_size) as writer:
                writer.add(np.arange(sum(sizes)), np.asarray(sizes), np.ones(len(sizes), bool))
                writer.finish({"tokenizer": "t", "tokenizer_fingerprint": "abc", "vocab_size": vocab_size})
            files = [Path(f"{prefix}{end}").read_bytes() for end in _NEW[:3]]
            found += [_BETWEEN.join(files), _BETWEEN.join([b"", *files[1:]])]
            found.append(_BETWEEN.join([*files, bytes(sum(sizes))]))  # with a loss mask
            found.append(_BETWEEN.join([b"", files[1][:18] + bytes(8) + b"\1" + bytes(15), b""]))  # no sequences
            found.append(_BETWEEN.join([json.dumps({"text": "a"}).encode(), *files[1:]]))
    for more in ({}, {"docs": np.asarray([0, 1, 2])}, {"docs": np.asarray([1, 2]), "sents": np.asarray([0, 1, 2])}):
        for save in (np.savez, np.savez_compressed):
            ids, index = io.BytesIO(), io.BytesIO()
            np.save(ids, np.arange(20, dtype=np.uint16))
            save(index, lens=np.asarray([8, 12], np.int32), **more)
            found.append(_BETWEEN.join([ids.getvalue(), index.getvalue()]))
    return found


HARNESS = Harness(
    target,
    seeds,
    tokens=[
        b"\xff\xff\xff\xff",
        b"\x00" * 8,
        b"\xff" * 8,
        b"\x00\x00\x00\x80",
        b'"largest_id": -5,',
        b'"tokens": 1e9,',
        b'"format": 2,',
        b"null",
        b"'shape': (99999999999,)",
        b"'descr': '|O'",
        b"'descr': '<f8'",
        b"(((((",
        _BETWEEN,
    ],
)
