"""Pretraining datasets over .bin/.idx (or legacy .npy/.npz) corpora.

Items are read by PaddleNLP's GPTDataset, with an index of our own. PaddleNLP's index is built for a fixed number of
samples, so the data order changes with the batch size. It is cached under a name that ignores the content of the files,
and the other ranks wait forever if rank 0 can't write it. Ours covers one epoch and depends on the corpus and the seed
only. It takes 30 ms for a million documents, so nothing is cached.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddlenlp.data.causal_dataset import GPTDataset
from paddlenlp.data.indexed_dataset import CompatibleIndexedDataset, MMapIndexedDataset

from oarlock.data.corpus.blend import parse_blend
from oarlock.data.corpus.documents import Documents, check_summary, remarks
from oarlock.data.corpus.index_format import check_corpus, is_corpus_present, is_legacy, token_ids
from oarlock.data.corpus.legacy_format import read_ids, read_index
from oarlock.data.corpus.notes import read_corpus_summary
from oarlock.data.tokenizers.token_ids import check_range
from oarlock.environment.console import log_once
from oarlock.errors import DataError
from oarlock.files import compute_sha256

SPLIT_NAMES = ("train", "eval", "test")


class LegacyCorpus(CompatibleIndexedDataset):
    """prefix_ids.npy and prefix_idx.npz, read without pickle (PaddleNLP's own reader allows it)."""

    def __init__(self, prefix: str) -> None:
        paddle.io.Dataset.__init__(self)
        self._path = prefix
        self._token_ids = read_ids(prefix)
        self._sizes, self._doc_idx = read_index(prefix, len(self._token_ids))
        if len(self._doc_idx) and self._doc_idx[0] != 0:
            self._doc_idx = np.concatenate(([0], self._doc_idx))
        self._pointers = np.concatenate(([0], np.cumsum(self._sizes, dtype=np.int64)))

    def __setstate__(self, prefix: str) -> None:
        self.__init__(prefix)  # type: ignore[misc]


@dataclass(frozen=True)
class Corpus:
    """An opened corpus."""

    prefix: str
    documents: Documents
    fingerprint: str

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.documents)

    @classmethod
    def open(cls, prefix: str) -> Corpus:
        """Open and check a corpus.

        Raises:
            DataError: if a file is missing or does not fit the others.
        """
        if not is_corpus_present(prefix):
            raise DataError(f"{prefix}.bin and {prefix}.idx: no such corpus; make one with `oarlock data pretrain`")
        if is_legacy(prefix):
            reader: Any = LegacyCorpus(prefix)
            index = Path(f"{prefix}_idx.npz")
        else:
            check_corpus(prefix)
            with contextlib.redirect_stdout(io.StringIO()):  # PaddleNLP prints six lines per corpus
                reader = MMapIndexedDataset(prefix, skip_warmup=True)
            index = Path(f"{prefix}.idx")
        documents = Documents(reader, prefix)
        check_summary(prefix, documents)
        for remark in remarks(prefix, documents, len(reader.sizes)):
            log_once(remark)
        # The order of samples depends only on the lengths of documents, which are in the index. Runs of versions that
        # did not join the sequences of a document had another order.
        together = "" if len(documents) == len(reader.sizes) else " by documents"
        return cls(prefix, documents, compute_sha256(index) + together)

    def split(self, shares: tuple[float, float, float]) -> list[range]:
        """Split the documents into train, eval and test, rounded as by PaddleNLP's get_train_valid_test_split_."""
        bounds = [0]
        for share in shares:
            bounds.append(bounds[-1] + round(share * self.num_documents))
        excess = bounds[-1] - self.num_documents
        bounds = [0, *(max(0, bound - excess) for bound in bounds[1:])]
        return [range(first, last) for first, last in itertools.pairwise(bounds)]


class PretrainDataset(GPTDataset):
    """Samples of seq_length + 1 tokens from one split of a corpus, whose documents are concatenated in a seeded order.

    Item i is {"text": int64 [seq_length + 1]}. Consecutive samples share one token: the last label of one is the first
    input of the next (Megatron's layout).
    """

    def __init__(self, corpus: Corpus, documents: range, seq_length: int, seed: int) -> None:
        paddle.io.Dataset.__init__(self)
        self.name, self.indexed_dataset, self.return_doc_ids = corpus.prefix, corpus.documents, False
        self.doc_idx = documents.start + np.random.RandomState(seed).permutation(len(documents)).astype(np.int32)
        self.sample_idx = sample_index(corpus.documents.sizes[self.doc_idx], seq_length)
        self.shuffle_idx = range(len(self))  # the sampler shuffles

    def __len__(self) -> int:
        return len(self.sample_idx) - 1


def sample_index(sizes: np.ndarray, seq_length: int) -> np.ndarray:
    """Return the start (document, offset) of each sample, and of the end, [samples + 1, 2].

    The result equals that of fast_dataindex's build_sample_idx for one epoch, which prints on every call.

    Args:
        sizes: tokens of each document, in order, [documents].
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    num_samples = max(0, (int(ends[-1]) - 1) // seq_length) if len(sizes) else 0
    starts = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    document = np.searchsorted(ends, starts, side="right")
    before = np.concatenate(([0], ends))[document] if len(sizes) else starts
    return np.stack([document, starts - before], axis=1)


def parse_input(text: str) -> list[tuple[float | None, str]]:
    """Parse --input_dir to (weight, prefix) pairs: a folder, a prefix, or "w1 prefix1 w2 prefix2" (see parse_blend).

    A folder with several corpora blends them with equal weights, as PaddleNLP does.

    Raises:
        DataError: if there is no corpus, or a weight is not a number above 0.
    """
    path = Path(text)
    if path.is_dir():
        names = {p.name.removesuffix(".idx") for p in path.glob("*.idx")}
        names |= {p.name.removesuffix("_idx.npz") for p in path.glob("*_idx.npz")}
        prefixes = sorted(str(path / name) for name in names if is_corpus_present(path / name))
        if not prefixes:
            raise DataError(
                f"--input_dir {text}: no .bin/.idx corpus in this folder; make one with "
                f"`oarlock data pretrain --input FILES --tokenizer DIR --output-prefix {path / 'corpus'}`"
            )
        return [(1.0, prefix) for prefix in prefixes]
    pairs = parse_blend(text, "--input_dir", is_corpus_present)
    if len(pairs) == 1 and not is_corpus_present(pairs[0][1]):
        raise DataError(f"--input_dir {text}: neither a folder nor the prefix of a .bin/.idx corpus")
    return pairs


def check_token_ids(corpora: list[Corpus], vocab_size: int) -> None:
    """Refuse corpora with token ids outside the vocabulary of the model.

    Raises:
        DataError: with the corpus and the id.
    """
    for prefix in dict.fromkeys(corpus.prefix for corpus in corpora):
        name = f"{prefix}_ids.npy" if is_legacy(prefix) else f"{prefix}.bin"
        check_range(token_ids(prefix), vocab_size, name)


def find_largest_known_id(corpora: list[Corpus]) -> int:
    """Return the largest token id recorded for the corpora, or -1 if none is recorded."""
    return max((int(read_corpus_summary(corpus.prefix).get("largest_id", -1)) for corpus in corpora), default=-1)
