"""Corpora for tests."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from paddlenlp.data.indexed_dataset import MMapIndexedDataset

from oarlock.data.corpus.build_corpus import BuildOptions, build_corpus
from oarlock.data.tokenizers.load import load_encoder

TEXTS = ["Repeat the words.", "water\nfire", "星期一 后一天", "a" * 300, "x"]


def build(tmp_path: Path, tokenizer: Path, *inputs: Path, name: str = "c", **options):
    prefix = tmp_path / "out" / name
    inputs = inputs or (tmp_path,)
    report = build_corpus(BuildOptions(tuple(map(str, inputs)), str(tokenizer), str(prefix), **options))
    return prefix, report


def read_documents(prefix: Path) -> list[list[int]]:
    """Token ids of every document, as read by PaddleNLP."""
    data = MMapIndexedDataset(str(prefix), skip_warmup=True)
    bounds = data.doc_idx
    return [
        np.concatenate([data[int(s)] for s in range(first, last)]).tolist()
        for first, last in itertools.pairwise(bounds)
    ]


def read_sequences(prefix: Path) -> list[list[int]]:
    """Every sequence of the index, as read by PaddleNLP; each must be a document."""
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
