"""Pretraining from end to end."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oarlock.config.pretrain import parse_split
from oarlock.data.corpus.blend import ConcatenatedDataset, blend, compute_shares, make_short_names
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
from oarlock.data.examples.collate import PretrainCollator
from oarlock.data.examples.eval_prompts import load_eval_prompts
from oarlock.data.examples.labels import EvalPrompt
from oarlock.data.templates.chat_template import choose_template
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.environment.cache import cache_folder
from oarlock.environment.console import get_logger
from oarlock.errors import DataError
from oarlock.models.build import (
    build_model,
    check_lengths,
    check_vocabulary,
    check_weights,
    find_model,
)
from oarlock.parallel.object_collectives import run_on_all_ranks
from oarlock.train.checkpoint.resume import find_resume_point
from oarlock.train.evaluation.prompts import PromptSet
from oarlock.train.output.folder_guard import guard_run
from oarlock.train.run_training import check_schedule, make_trainer, run_training
from oarlock.train.sequence_lengths import fit_lengths
from oarlock.train.setup import connect_ranks, start_run, training_bytes
from oarlock.train.throughput import compute_token_flops

if TYPE_CHECKING:
    from oarlock.config.load import LoadedConfig
    from oarlock.config.pretrain import PretrainConfig

logger = get_logger(__name__)

_ANSWER_LENGTH = 64  # tokens after a prompt of --eval_prompts


def pretrain(loaded: LoadedConfig[PretrainConfig]) -> int:
    """Pretrain: plan, check, build the model, train. Returns the exit code."""
    with guard_run(Path(loaded.config.checkpoint.output_dir)):
        return _pretrain(loaded)


def _pretrain(loaded: LoadedConfig[PretrainConfig]) -> int:
    run = start_run(loaded)
    source = find_model(run.config, from_weights=run.config.model.continue_training)
    run.config = fit_lengths(run.config, source, loaded.origins)
    config: PretrainConfig = run.config
    check_lengths(source, config.data.max_seq_length, "--max_seq_length")
    connect_ranks(run, source, config.data.max_seq_length)
    check_weights(source)
    tokenizer_name = config.model.tokenizer_name_or_path or str(source.folder)
    tokenizer = load_tokenizer(tokenizer_name)
    check_vocabulary(source, len(tokenizer), f"tokenizer {tokenizer_name}", tokenizer_name)
    inputs = parse_input(config.data.input_dir or _build_embedded_corpus(tokenizer_name))
    corpora = [Corpus.open(prefix) for _, prefix in inputs]
    prefixes = [corpus.prefix for corpus in corpora]
    check_corpus_tokenizers(prefixes, tokenizer, tokenizer_name, config.data.allow_other_tokenizer)
    check_vocabulary(source, find_largest_known_id(corpora) + 1, f"the corpus {inputs[0][1]}")
    run_on_all_ranks(lambda: check_token_ids(corpora, source.config.vocab_size), first_rank_only=True)
    for corpus in corpora:
        _report_missing_ends(corpus, tokenizer)
    weights = [weight for weight, _ in inputs]
    train_sets, eval_sets = _open_split(config, corpora, 0), _open_split(config, corpora, 1)
    names = make_short_names([corpus.prefix for corpus in corpora])
    # A held-out corpus has the weight of its training set; without training, weight `all` stands for its tokens.
    sizes = [len(dataset) for dataset in train_sets if dataset]
    if not sizes:
        sizes = [int(corpus.documents.sizes.sum(dtype=np.int64)) for corpus in corpora]
    shares = compute_shares(weights, sizes)

    prompt_sets = _load_fixed_prompts(config, tokenizer)
    text = "".join(f"{corpus.fingerprint}{weight}" for corpus, weight in zip(corpora, weights, strict=True))
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    resume = find_resume_point(config, fingerprint)
    trained = [dataset for dataset in train_sets if dataset]
    train_set, order = blend(trained, names, weights, config.runtime.seed) if trained else (None, None)
    check_schedule(run, order, resume)
    first = next((dataset for dataset in eval_sets if dataset), None)
    if first is None or run.plan.sequence_parallel:  # which fixes the length of the model's inputs
        prompt_sets = []
    else:
        prompt_sets = [_choose_continuations(first, tokenizer), *prompt_sets]
    found = [i for i, dataset in enumerate(eval_sets) if dataset is not None]
    held_out = None
    if found:
        evaluated = [dataset for dataset in eval_sets if dataset is not None]
        held_out = ConcatenatedDataset(evaluated, [names[i] for i in found], [shares[i] for i in found])
    model = build_model(
        source,
        run.dtype,
        config.model.allow_pickle_weights,
        config.runtime.seed,
        run.plan.pipeline > 1,
        training_bytes=training_bytes(run),
    )
    trainer = make_trainer(
        run,
        model,
        resume,
        generation=source.generation(),
        order=order,
        template=None,
        tokenizer=tokenizer,
        flops=compute_token_flops(source.config, config.data.max_seq_length),
        data_fingerprint=fingerprint,
        prompt_sets=prompt_sets,
        train_dataset=train_set,
        eval_dataset=held_out,
        data_collator=PretrainCollator(source.config.vocab_size),
    )
    if config.evaluation.do_train:
        run_training(run, trainer)
    elif config.evaluation.do_eval:
        trainer.evaluate()
    return 0


def _build_embedded_corpus(tokenizer_name: str) -> str:
    logger.info("no --input_dir: pretraining on the embedded text (the Python standard library)")
    try:
        return str(build_embedded_corpus(cache_folder(), tokenizer_name))
    except OSError as error:
        raise DataError(
            f"the embedded text can't be stored in {cache_folder()} ({error.strerror}); set XDG_CACHE_HOME to a "
            "writable folder, or give --input_dir"
        ) from error


def _report_missing_ends(corpus: Corpus, tokenizer: Any) -> None:
    """Report documents without an end token, from which a model learns where texts end."""
    if tokenizer.eos_token_id is None:
        return
    fraction = ends_with(corpus.documents, tokenizer.eos_token_id)
    if fraction < 1:
        ends = f"only {fraction:.1%} of the documents end" if fraction else "no document ends"
        logger.info(
            f"{corpus.prefix}: {ends} with the tokenizer's end token ({tokenizer.eos_token}), from which a model "
            "learns where a text ends. `oarlock data pretrain` adds it (in other programs: --append-eod or "
            "--append_eos)"
        )


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


def _load_fixed_prompts(config: PretrainConfig, tokenizer: Any) -> list[PromptSet]:
    """Load --eval_prompts as plain text."""
    if config.evaluation.eval_prompts is None:
        return []
    new_tokens = min(_ANSWER_LENGTH, config.data.max_seq_length // 2)
    template = choose_template("plain", tokenizer, "")
    longest = config.data.max_seq_length - new_tokens
    prompts = load_eval_prompts(config.evaluation.eval_prompts, tokenizer, template, longest)
    return [PromptSet(prompts, new_tokens, config.batch.per_device_eval_batch_size)]


def _choose_continuations(dataset: PretrainDataset, tokenizer: Any, count: int = 3, length: int = 24) -> PromptSet:
    """Choose the first tokens of held-out samples, which the model continues at each evaluation."""
    length = min(length, len(dataset[0]["text"]) // 2)
    rows = [dataset[i]["text"][: 2 * length].tolist() for i in range(min(count, len(dataset)))]
    prompts = [EvalPrompt(row[:length], tokenizer.decode(row[:length]), tokenizer.decode(row[length:])) for row in rows]
    return PromptSet(prompts, length, len(prompts))
