"""Pretraining datasets over .bin/.idx (or legacy .npy/.npz) corpora.

The item access is PaddleNLP's GPTDataset; the index behind it is our own. PaddleNLP's is built for a fixed number of
samples (so the data order changes with the batch size), is cached under a name that ignores the file's contents, and
leaves the other ranks spinning when rank 0 can't write it. Ours covers one epoch, depends on nothing but the corpus
and the seed, and takes 30 ms for a million documents, so that nothing is cached.
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
from fast_dataindex import helpers
from paddlenlp.data.causal_dataset import GPTDataset
from paddlenlp.data.indexed_dataset import CompatibleIndexedDataset, MMapIndexedDataset

from oarlock.data.corpus_format import check_corpus, corpus_exists, corpus_summary, is_legacy
from oarlock.data.order import SampleOrder
from oarlock.errors import DataError
from oarlock.files import file_sha256

SPLIT_NAMES = ("train", "eval", "test")


class LegacyCorpus(CompatibleIndexedDataset):
    """prefix_ids.npy and prefix_idx.npz, read without pickle (PaddleNLP's own reader allows it)."""

    def __init__(self, prefix: str) -> None:
        paddle.io.Dataset.__init__(self)
        self._path = prefix
        try:
            self._token_ids = np.load(f"{prefix}_ids.npy", mmap_mode="r", allow_pickle=False)
            with np.load(f"{prefix}_idx.npz", allow_pickle=False) as index:
                self._sizes, self._doc_idx = index["lens"].astype(np.int32), index["docs"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{prefix}_ids.npy / _idx.npz: not a readable corpus: {error}") from error
        self._pointers = np.concatenate(([0], np.cumsum(self._sizes, dtype=np.int64)))
        if self._pointers[-1] != len(self._token_ids):
            raise DataError(
                f"{prefix}_ids.npy: {len(self._token_ids):,} tokens, its index expects {self._pointers[-1]:,}"
            )

    def __setstate__(self, prefix: str) -> None:
        self.__init__(prefix)  # type: ignore[misc]


@dataclass(frozen=True)
class Corpus:
    """An opened corpus. `documents` are the sequences of the index."""

    prefix: str
    reader: Any
    num_documents: int
    fingerprint: str

    @classmethod
    def open(cls, prefix: str) -> Corpus:
        """Open and check.

        Raises:
            DataError: when a file is missing or does not fit the other.
        """
        if not corpus_exists(prefix):
            raise DataError(f"{prefix}.bin and {prefix}.idx: no such corpus; make one with `oarlock data pretrain`")
        if is_legacy(prefix):
            reader: Any = LegacyCorpus(prefix)
            index = Path(f"{prefix}_idx.npz")
        else:
            check_corpus(prefix)
            with contextlib.redirect_stdout(io.StringIO()):  # PaddleNLP prints six lines for each
                reader = MMapIndexedDataset(prefix, skip_warmup=True)
            index = Path(f"{prefix}.idx")
        # The index holds the length of every document, which is all that the order of samples depends on.
        return cls(prefix, reader, len(reader.sizes), file_sha256(index))

    def split(self, shares: tuple[float, float, float]) -> list[range]:
        """Documents of train, eval and test: consecutive, the rounding PaddleNLP's get_train_valid_test_split_ uses."""
        bounds = [0]
        for share in shares:
            bounds.append(bounds[-1] + round(share * self.num_documents))
        excess = bounds[-1] - self.num_documents
        bounds = [0, *(max(0, bound - excess) for bound in bounds[1:])]
        return [range(first, last) for first, last in itertools.pairwise(bounds)]


class PretrainDataset(GPTDataset):
    """Samples of seq_length + 1 tokens cut from one split of a corpus, documents joined in a seeded order.

    Item i: {"text": int64 [seq_length + 1]}; consecutive samples share one token, which is the last label of one and
    the first input of the next (Megatron's layout).
    """

    def __init__(self, corpus: Corpus, documents: range, seq_length: int, seed: int) -> None:
        paddle.io.Dataset.__init__(self)
        self.name, self.indexed_dataset, self.return_doc_ids = corpus.prefix, corpus.reader, False
        self.doc_idx = documents.start + np.random.RandomState(seed).permutation(len(documents)).astype(np.int32)
        self.sample_idx = sample_index(np.asarray(corpus.reader.sizes)[self.doc_idx], seq_length)
        self.shuffle_idx = range(len(self))  # the order is the sampler's

    def __len__(self) -> int:
        return len(self.sample_idx) - 1


def sample_index(sizes: np.ndarray, seq_length: int) -> np.ndarray:
    """Where samples start: (document, offset) of each, and of the end; [samples + 1, 2].

    Equal to fast_dataindex's build_sample_idx for one epoch (a test compares them), which prints on every call.

    Args:
        sizes: tokens of each document, in order, [documents].
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    num_samples = max(0, (int(ends[-1]) - 1) // seq_length) if len(sizes) else 0
    starts = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    document = np.searchsorted(ends, starts, side="right")
    before = np.concatenate(([0], ends))[document] if len(sizes) else starts
    return np.stack([document, starts - before], axis=1)


class BlendedDataset(paddle.io.Dataset):
    """An endless mix of datasets by weight: item i comes from the dataset that is furthest behind its share.

    The choice at i does not depend on how many items follow (fast_dataindex's build_blending_indices is greedy), so
    the table is made longer as positions ask for it. Each dataset goes through its own epochs. The length is that of
    all datasets together, one epoch of the mix by convention.
    """

    def __init__(self, datasets: list[PretrainDataset], weights: list[float], seed: int) -> None:
        self.datasets = datasets
        self._shares = np.asarray(weights, np.float64) / sum(weights)
        self._orders = [SampleOrder(len(dataset), seed + i) for i, dataset in enumerate(datasets)]
        self._which, self._item = np.zeros(0, np.int16), np.zeros(0, np.int64)

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index >= len(self._which):
            self._lengthen(max(index + 1, 2 * len(self._which), 1 << 16))
        which = self._which[index]
        return self.datasets[which][self._orders[which][int(self._item[index])]]

    def _lengthen(self, size: int) -> None:
        self._which, self._item = np.zeros(size, np.int16), np.zeros(size, np.int64)
        helpers.build_blending_indices(self._which, self._item, self._shares, len(self.datasets), size, False)


class ConcatenatedDataset(paddle.io.Dataset):
    """Datasets one after the other (evaluation over a blend sees each once)."""

    def __init__(self, datasets: list[PretrainDataset]) -> None:
        self.datasets = datasets
        self._ends = np.cumsum([len(dataset) for dataset in datasets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.datasets[which][index - int(self._ends[which - 1] if which else 0)]


def parse_input(text: str) -> list[tuple[float, str]]:
    """(weight, prefix) pairs of --input_dir: a folder, a prefix, or "w1 prefix1 w2 prefix2".

    A folder with several corpora blends them with equal weights, as PaddleNLP does.

    Raises:
        DataError: when nothing is there, or the weights are not numbers above 0.
    """
    path = Path(text)
    if path.is_dir():
        names = {p.name.removesuffix(".idx") for p in path.glob("*.idx")}
        names |= {p.name.removesuffix("_idx.npz") for p in path.glob("*_idx.npz")}
        prefixes = sorted(str(path / name) for name in names if corpus_exists(path / name))
        if not prefixes:
            raise DataError(
                f"--input_dir {text}: no .bin/.idx corpus in this folder; make one with "
                f"`oarlock data pretrain --input FILES --tokenizer DIR --output-prefix {path / 'corpus'}`"
            )
        return [(1.0, prefix) for prefix in prefixes]
    words = text.split()
    if len(words) <= 1 or corpus_exists(text):
        if not corpus_exists(text):
            raise DataError(f"--input_dir {text}: neither a folder nor the prefix of a .bin/.idx corpus")
        return [(1.0, text)]
    if len(words) % 2:
        raise DataError(f'--input_dir {text}: a blend is "weight1 prefix1 weight2 prefix2 ..."')
    pairs = []
    for weight, prefix in zip(words[::2], words[1::2], strict=True):
        try:
            value = float(weight)
        except ValueError:
            value = -1.0
        if not 0 < value < float("inf"):
            raise DataError(f"--input_dir: weight {weight!r} of {prefix} must be a number above 0")
        pairs.append((value, prefix))
    return pairs


def largest_known_id(corpora: list[Corpus]) -> int:
    """The largest token id noted beside the corpora, -1 where none is noted."""
    return max((int(corpus_summary(corpus.prefix).get("largest_id", -1)) for corpus in corpora), default=-1)
