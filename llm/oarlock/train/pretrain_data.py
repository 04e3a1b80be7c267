"""The data of a pretraining run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from oarlock.config.pretrain import parse_split
from oarlock.data.corpus.blend import ConcatenatedDataset, compute_shares, make_short_names
from oarlock.data.corpus.dataset import (
    SPLIT_NAMES,
    Corpus,
    PretrainDataset,
    check_token_ids,
    find_largest_known_id,
    parse_input,
)
from oarlock.data.corpus.documents import ends_with
from oarlock.data.corpus.tokenizer_check import check_corpus_tokenizers
from oarlock.data.embedded.prepare import build_embedded_corpus
from oarlock.environment.cache import cache_folder
from oarlock.environment.console import get_logger
from oarlock.errors import DataError
from oarlock.models.build import ModelSource, check_vocabulary
from oarlock.parallel.object_collectives import run_on_all_ranks

if TYPE_CHECKING:
    from oarlock.config.pretrain import PretrainConfig

logger = get_logger(__name__)


@dataclass(frozen=True)
class PretrainData:
    """The data of a pretraining run.

    Attributes:
        train: samples to train on, by corpus; empty without --do_train.
        held_out: samples to evaluate; None without --do_eval.
        names: short names of the corpora.
        weights: of the corpora in training; None for `all`.
        fingerprint: changes with the corpora and their weights.
    """

    train: list[PretrainDataset]
    held_out: ConcatenatedDataset | None
    names: list[str]
    weights: list[float | None]
    fingerprint: str

    @classmethod
    def open(cls, config: PretrainConfig, source: ModelSource, tokenizer: Any, tokenizer_name: str) -> PretrainData:
        """Open and check the corpora of --input_dir, or the embedded one. All ranks have to call it together.

        Args:
            source: the model, which has to know the ids of the corpora.
            tokenizer_name: for messages.

        Raises:
            DataError: for a corpus of another tokenizer or model, or one without a sample to train on.
        """
        given = config.data.input_dir
        if not given:
            logger.info("no --input_dir: pretraining on the embedded text (the Python standard library)")
            try:
                given = str(build_embedded_corpus(cache_folder(), tokenizer_name))
            except OSError as error:
                raise DataError(
                    f"the embedded text can't be stored in {cache_folder()} ({error.strerror}); set XDG_CACHE_HOME to "
                    "a writable folder, or give --input_dir"
                ) from error
        inputs = parse_input(given)
        corpora = [Corpus.open(prefix) for _, prefix in inputs]
        prefixes = [corpus.prefix for corpus in corpora]
        check_corpus_tokenizers(prefixes, tokenizer, tokenizer_name, config.data.allow_other_tokenizer)
        check_vocabulary(source, find_largest_known_id(corpora) + 1, f"the corpus {inputs[0][1]}")
        run_on_all_ranks(lambda: check_token_ids(corpora, source.config.vocab_size), first_rank_only=True)
        for corpus in corpora:
            end = tokenizer.eos_token_id
            fraction = 1.0 if end is None else ends_with(corpus.documents, end)
            if fraction < 1:
                ends = f"only {fraction:.1%} of the documents end" if fraction else "no document ends"
                logger.info(
                    f"{corpus.prefix}: {ends} with the tokenizer's end token ({tokenizer.eos_token}), from which a "
                    "model learns where a text ends. `oarlock data pretrain` adds it (in other programs: --append-eod "
                    "or --append_eos)"
                )
        weights, names = [weight for weight, _ in inputs], make_short_names(prefixes)
        train = [dataset for dataset in _open_split(config, corpora, 0) if dataset]
        # A held-out corpus has the weight of its training set; without training, weight `all` stands for its tokens.
        sizes = [len(dataset) for dataset in train]
        if not sizes:
            sizes = [int(corpus.documents.sizes.sum(dtype=np.int64)) for corpus in corpora]
        shares = compute_shares(weights, sizes)
        evaluated = [(i, dataset) for i, dataset in enumerate(_open_split(config, corpora, 1)) if dataset is not None]
        held_out = None
        if evaluated:
            places, datasets = zip(*evaluated, strict=True)
            held_out = ConcatenatedDataset(datasets, [names[i] for i in places], [shares[i] for i in places])
        text = "".join(f"{corpus.fingerprint}{weight}" for corpus, weight in zip(corpora, weights, strict=True))
        return cls(train, held_out, names, weights, hashlib.sha256(text.encode()).hexdigest())


def _open_split(config: PretrainConfig, corpora: list[Corpus], split: int) -> list[PretrainDataset | None]:
    """Open the datasets of one split: None for a corpus without a sample, and no datasets if the split is not used.

    Raises:
        DataError: if the training split of a corpus, or every evaluation split, is shorter than a sample.
    """
    wanted = config.evaluation.do_train if split == 0 else config.evaluation.do_eval
    if not wanted:
        return []
    shares = parse_split(config.data.split)
    found: list[PretrainDataset | None] = []
    for corpus in corpora:
        documents = corpus.split(shares)[split]
        dataset = PretrainDataset(corpus, documents, config.data.max_seq_length, config.runtime.seed)
        if len(dataset):
            found.append(dataset)
            continue
        tokens = int(corpus.documents.sizes[documents.start : documents.stop].sum(dtype=np.int64))
        problem = (
            f"{corpus.prefix}: the {SPLIT_NAMES[split]} split (--split {config.data.split}) has {len(documents):,} of "
            f"{corpus.num_documents:,} documents with {tokens:,} tokens; one sample needs "
            f"{config.data.max_seq_length + 1:,}"
        )
        if split == 0:
            raise DataError(f"{problem}. Increase its share, or reduce --max_seq_length")
        logger.info(f"{problem}; it is not evaluated")
        found.append(None)
    if not any(found):
        raise DataError("--do_eval: no corpus has an evaluation sample; increase the share of evaluation in --split")
    return found
