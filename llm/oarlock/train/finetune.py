"""Fine-tuning from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarlock.data.corpus.blend import blend
from oarlock.data.examples.collate import FinetuneCollator, PackCollator
from oarlock.data.examples.dataset import ExampleDataset, FinetuneData, load_finetune_data
from oarlock.data.examples.eval_prompts import load_eval_prompts
from oarlock.data.examples.packing import COMPARED_BATCH, PackedDataset
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.environment.console import get_logger
from oarlock.errors import DataError
from oarlock.families.registry import FAMILIES
from oarlock.models.build import (
    build_model,
    check_lengths,
    check_vocabulary,
    check_weights,
    find_model,
)
from oarlock.models.load_finetuned import check_base
from oarlock.models.packing import check_packing
from oarlock.peft.adapter_folder import read_base_once
from oarlock.peft.method import choose_method
from oarlock.peft.open_adapter import open_adapter
from oarlock.peft.qlora import count_quantized_bytes
from oarlock.train.checkpoint.final_model import merge_adapter
from oarlock.train.checkpoint.resume import find_resume_point
from oarlock.train.evaluation.prompts import PromptSet
from oarlock.train.output.folder_guard import guard_run
from oarlock.train.run_training import check_schedule, make_trainer, run_training
from oarlock.train.sequence_lengths import fit_lengths
from oarlock.train.setup import connect_ranks, start_run, training_bytes
from oarlock.train.start_from_adapter import start_from_adapter
from oarlock.train.throughput import compute_token_flops

if TYPE_CHECKING:
    from oarlock.config.finetune import FinetuneConfig
    from oarlock.config.load import LoadedConfig

logger = get_logger(__name__)


def finetune(loaded: LoadedConfig[FinetuneConfig]) -> int:
    """Fine-tune: plan, check, build the model, train. Returns the exit code."""
    with guard_run(Path(loaded.config.checkpoint.output_dir)):
        return _finetune(loaded)


def _finetune(loaded: LoadedConfig[FinetuneConfig]) -> int:
    run = start_run(loaded)
    run.config = start_from_adapter(run.config, loaded.origins)
    source = find_model(run.config, from_weights=True)
    method, family = choose_method(run.config.method), source.config.model_type
    if method is not None:
        method.check(family)
    prefix = method.positions(family) if method is not None else 0
    run.config = fit_lengths(run.config, source, loaded.origins, prefix)
    config: FinetuneConfig = run.config
    packing, longest = config.data.packing, config.sequence_length
    example_length = config.data.src_length + config.data.tgt_length
    longer_packs = config.data.row_length > example_length
    flag = "--packing_length" if longer_packs else "--src_length + --tgt_length"
    check_lengths(source, longest + prefix, f"{flag} after the prefix" if prefix else flag)
    if packing:
        check_packing(source.config)
    connect_ranks(run, source, longest)
    check_weights(source)
    tokenizer_name = config.model.tokenizer_name_or_path or str(source.folder)
    tokenizer = load_tokenizer(tokenizer_name)
    check_vocabulary(source, len(tokenizer), f"tokenizer {tokenizer_name}", tokenizer_name)
    training, seed = config.evaluation.do_train, config.runtime.seed
    asked = config.evaluation.do_generation
    data = load_finetune_data(config.data, tokenizer, need_train=training, seed=seed, need_prompts=asked)
    if config.evaluation.do_eval and data.dev is None:
        raise DataError(
            f"--do_eval: {config.data.dataset_name_or_path} has no dev file; give a folder with train.json and "
            "dev.json (or .jsonl), hold out examples with --validation_split 0.02, or drop --do_eval"
        )
    prompt_sets = _load_prompt_sets(config, data, tokenizer)
    train_set, order = None, None
    if training:
        sets = [_pack(config, part.train) if packing else part.train for part in data.sets]
        train_set, order = blend(sets, [part.name for part in data.sets], [part.weight for part in data.sets], seed)
    base = read_base_once(config.model.model_name_or_path, source.folder) if method is not None else None
    adapter = config.method.adapter_name_or_path
    if adapter and base is not None:
        check_base(open_adapter(adapter).base, base)
    resume = find_resume_point(config, data.fingerprint, base)
    check_schedule(run, order, resume)
    model = build_model(
        source,
        run.dtype,
        config.model.allow_pickle_weights,
        config.runtime.seed,
        run.plan.pipeline > 1,
        method,
        Path(adapter) if adapter else None,
        training_bytes(run),
    )
    if config.method.qlora:
        now, before = count_quantized_bytes(model)
        algorithm = config.method.weight_quantize_algo
        logger.info(
            f"QLoRA: {algorithm} weights take {now / 1e6:,.1f} MB, {before / now:.1f} times less than in float32"
        )
    collator = PackCollator if packing else FinetuneCollator
    decoder = FAMILIES[source.config.model_type].decoder
    blocks = () if decoder is None else decoder(source.config).blocks
    with_positions = any(block.attention.rope and block.attention.rope.depends_on_length for block in blocks)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    trainer = make_trainer(
        run,
        model,
        resume,
        method=method,
        base=base,
        generation=source.generation(),
        order=order,
        template=data.template,
        tokenizer=tokenizer,
        flops=compute_token_flops(source.config, example_length if packing else longest),
        data_fingerprint=data.fingerprint,
        prompt_sets=prompt_sets,
        train_dataset=train_set,
        eval_dataset=data.dev if config.evaluation.do_eval else None,
        data_collator=collator(source.config.vocab_size, pad, run.plan.length_multiple, with_positions),
    )
    if config.evaluation.do_train:
        finished = run_training(run, trainer)
        if finished and config.method.merge_weights:
            merge_adapter(Path(config.checkpoint.output_dir), source.folder, config.model.allow_pickle_weights)
    elif config.evaluation.do_eval:
        trainer.evaluate()
    return 0


def _pack(config: FinetuneConfig, examples: ExampleDataset) -> ExampleDataset | PackedDataset:
    """Pack the examples, unless packs would be no fuller than padded batches: then masks would only cost time."""
    made = PackedDataset(examples, config.data.packing_length, config.runtime.seed)
    packed, padded = made.measure_fill()
    if len(made) < len(examples) and packed > padded:
        logger.info(made.describe())
        return made
    logger.info(
        f"--packing: nothing is packed; packs of {made.capacity:,} tokens would be {packed:.1%} full, batches of "
        f"{COMPARED_BATCH} examples are {padded:.1%} full; a larger --packing_length may pack better"
    )
    return examples


def _load_prompt_sets(config: FinetuneConfig, data: FinetuneData, tokenizer: Any) -> list[PromptSet]:
    """Load the prompts of evaluations: held-out ones (--do_generation), and those of a file (--eval_prompts)."""
    sets: list[PromptSet] = []
    evaluation, new_tokens = config.evaluation, config.data.tgt_length
    batch_size = config.batch.per_device_eval_batch_size
    if evaluation.do_generation:
        limit = evaluation.max_evaluate_steps
        prompts = data.dev_prompts[: limit * batch_size] if limit > 0 else data.dev_prompts
        sets.append(PromptSet(prompts, new_tokens, batch_size, scored=True))
    if evaluation.eval_prompts is not None:
        fixed = load_eval_prompts(evaluation.eval_prompts, tokenizer, data.template, config.data.src_length)
        sets.append(PromptSet(fixed, new_tokens, batch_size))
    return sets
