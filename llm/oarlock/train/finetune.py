"""Fine-tuning from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarlock.data.collate import FinetuneCollator
from oarlock.data.eval_prompts import load_eval_prompts
from oarlock.data.finetune import FinetuneData, load_finetune_data
from oarlock.data.order import SampleOrder
from oarlock.data.tokenizers import load_tokenizer
from oarlock.environment import say
from oarlock.errors import DataError
from oarlock.models.adapter import shared_base
from oarlock.models.build import build_model, check_lengths, check_vocabulary, find_model
from oarlock.models.methods import choose_method
from oarlock.models.qlora import quantized_bytes
from oarlock.parallel.plan import sequence_length
from oarlock.train.answers import Asking, FixedPrompts, HeldOutPrompts, one_after_another
from oarlock.train.checkpoint import find_resume_point
from oarlock.train.flops import token_flops
from oarlock.train.run import connect, make_trainer, start, train

if TYPE_CHECKING:
    from oarlock.config.load import LoadedConfig
    from oarlock.config.schema import FinetuneConfig


def finetune(loaded: LoadedConfig[FinetuneConfig]) -> int:
    """parse -> check -> plan -> build -> train; returns the exit code."""
    run = start(loaded)
    config: FinetuneConfig = run.config
    source = find_model(config, from_weights=True)
    longest = sequence_length(config)
    check_lengths(source, longest, "--src_length + --tgt_length")
    connect(run, source, longest)
    tokenizer_name = config.model.tokenizer_name_or_path or str(source.folder)
    tokenizer = load_tokenizer(tokenizer_name)
    check_vocabulary(source, len(tokenizer), f"tokenizer {tokenizer_name}")
    data = load_finetune_data(config.data, tokenizer, need_train=config.evaluation.do_train)
    if config.evaluation.do_eval and data.dev is None:
        raise DataError(
            f"--do_eval: {config.data.dataset_name_or_path} has no dev file; give a folder with train.json and "
            "dev.json (or .jsonl), or leave --do_eval out"
        )
    asking = _asking(config, data, tokenizer)
    method = choose_method(config.method)
    base = shared_base(config.model.model_name_or_path, source.folder) if method is not None else None
    resume = find_resume_point(config, data.fingerprint, base)
    adapter = config.method.adapter_name_or_path
    model = build_model(
        source,
        run.dtype,
        config.model.allow_pickle_weights,
        config.runtime.seed,
        run.plan.pipeline > 1,
        method,
        Path(adapter) if adapter else None,
    )
    if config.method.qlora:
        now, before = quantized_bytes(model)
        algorithm = config.method.weight_quantize_algo
        say(f"QLoRA: {algorithm} weights take {now / 1e6:,.1f} MB, {before / now:.1f} times less than in float32")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    trainer = make_trainer(
        run,
        model,
        resume,
        method=method,
        base=base,
        order=SampleOrder(len(data.train), config.runtime.seed) if len(data.train) else None,
        template=data.template,
        tokenizer=tokenizer,
        flops=token_flops(source.config, longest),
        data_fingerprint=data.fingerprint,
        generation_metrics=asking,
        train_dataset=data.train if config.evaluation.do_train else None,
        eval_dataset=data.dev if config.evaluation.do_eval else None,
        data_collator=FinetuneCollator(source.config.vocab_size, pad, run.plan.length_multiple),
    )
    if config.evaluation.do_train:
        train(run, trainer)
    elif config.evaluation.do_eval:
        trainer.evaluate()
    return 0


def _asking(config: FinetuneConfig, data: FinetuneData, tokenizer: Any) -> Asking | None:
    """What the model is asked at evaluations."""
    parts: list[Asking] = []
    batch, longest = config.batch.per_device_eval_batch_size, config.data.tgt_length
    if config.evaluation.do_generation:
        parts.append(HeldOutPrompts(data.dev_prompts, longest, batch, config.evaluation.max_evaluate_steps))
    if config.evaluation.eval_prompts is not None:
        prompts = load_eval_prompts(config.evaluation.eval_prompts, tokenizer, data.template, config.data.src_length)
        parts.append(FixedPrompts(prompts, longest, batch))
    return one_after_another(parts)
