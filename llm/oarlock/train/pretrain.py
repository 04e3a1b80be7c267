"""Pretraining from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarlock.data.corpus.blend import blend
from oarlock.data.examples.collate import PretrainCollator
from oarlock.data.examples.eval_prompts import load_eval_prompts
from oarlock.data.examples.labels import EvalPrompt
from oarlock.data.templates.chat_template import choose_template
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.models.build import (
    build_model,
    check_lengths,
    check_vocabulary,
    check_weights,
    find_model,
)
from oarlock.train.checkpoint.resume import find_resume_point
from oarlock.train.evaluation.prompts import PromptSet
from oarlock.train.output.folder_guard import guard_run
from oarlock.train.pretrain_data import PretrainData
from oarlock.train.run_training import check_schedule, make_trainer, run_training
from oarlock.train.sequence_lengths import fit_lengths
from oarlock.train.setup import connect_ranks, start_run, training_bytes
from oarlock.train.throughput import compute_token_flops

if TYPE_CHECKING:
    from oarlock.config.load import LoadedConfig
    from oarlock.config.pretrain import PretrainConfig

_ANSWER_LENGTH = 64  # tokens after a prompt of --eval_prompts
_CONTINUED_SAMPLES, _CONTINUED_LENGTH = 3, 24  # held-out samples, and tokens of each, that the model continues


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
    data = PretrainData.open(config, source, tokenizer, tokenizer_name)
    prompt_sets = _load_prompt_sets(config, data, tokenizer)
    if run.plan.sequence_parallel:  # which fixes the length of the model's inputs
        prompt_sets = []
    resume = find_resume_point(config, data.fingerprint)
    train_set, order = None, None
    if data.train:
        train_set, order = blend(data.train, data.names, data.weights, config.runtime.seed)
    check_schedule(run, order, resume)
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
        data_fingerprint=data.fingerprint,
        prompt_sets=prompt_sets,
        train_dataset=train_set,
        eval_dataset=data.held_out,
        data_collator=PretrainCollator(source.config.vocab_size),
    )
    if config.evaluation.do_train:
        run_training(run, trainer)
    elif config.evaluation.do_eval:
        trainer.evaluate()
    return 0


def _load_prompt_sets(config: PretrainConfig, data: PretrainData, tokenizer: Any) -> list[PromptSet]:
    """Load what the model continues at each evaluation: beginnings of held-out samples, and --eval_prompts."""
    sets: list[PromptSet] = []
    if config.evaluation.eval_prompts is not None:
        new_tokens = min(_ANSWER_LENGTH, config.data.max_seq_length // 2)
        template = choose_template("plain", tokenizer, "")
        longest = config.data.max_seq_length - new_tokens
        fixed = load_eval_prompts(config.evaluation.eval_prompts, tokenizer, template, longest)
        sets.append(PromptSet(fixed, new_tokens, config.batch.per_device_eval_batch_size))
    if data.held_out is None:
        return []
    samples = data.held_out.datasets[0]
    length = min(_CONTINUED_LENGTH, len(samples[0]["text"]) // 2)
    prompts = []
    for i in range(min(_CONTINUED_SAMPLES, len(samples))):
        row = samples[i]["text"][: 2 * length].tolist()
        prompts.append(EvalPrompt(row[:length], tokenizer.decode(row[:length]), tokenizer.decode(row[length:])))
    return [PromptSet(prompts, length, len(prompts)), *sets]
