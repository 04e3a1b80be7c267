"""Rules that span several options. The checks of a single option are declared with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from oarlock.config.metric_names import METRICS, PREFIX, best_metric
from oarlock.config.run_config import RunConfig


def find_cross_problems(config: RunConfig) -> list[str]:
    """Every conflict among the options of a configuration."""
    return [
        *_combination_problems(config),
        *_best_model_problems(config),
        *config.find_own_problems(),
    ]


def _combination_problems(config: RunConfig) -> Iterator[str]:
    if not (config.evaluation.do_train or config.evaluation.do_eval):
        yield "nothing to do: give --do_train, --do_eval or both"
    precision = config.precision
    if precision.fp16 and precision.bf16:
        yield "--fp16 and --bf16 can't be combined"
    if precision.amp_master_grad and not (precision.fp16 or precision.bf16):
        yield "--amp_master_grad needs --fp16 or --bf16"
    parallel = config.parallel
    # ColumnSequenceParallelLinear asserts world_size > 1.
    if parallel.sequence_parallel and parallel.tensor_parallel_degree <= 1:
        yield "--sequence_parallel needs --tensor_parallel_degree above 1"
    if parallel.virtual_pp_degree > 1 and parallel.pipeline_parallel_degree <= 1:
        yield "--virtual_pp_degree above 1 needs --pipeline_parallel_degree above 1"
    checkpoint = config.checkpoint
    if checkpoint.overwrite_output_dir and checkpoint.resume_from_checkpoint:
        yield "--overwrite_output_dir starts from scratch and --resume_from_checkpoint resumes: give only one of them"
    schedule = config.schedule
    if schedule.min_learning_rate > schedule.learning_rate:
        yield f"--min_learning_rate {schedule.min_learning_rate} is above --learning_rate {schedule.learning_rate}"
    if 0 < schedule.max_steps <= schedule.warmup_steps:
        yield f"--warmup_steps {schedule.warmup_steps} takes all of --max_steps {schedule.max_steps}"
    if schedule.max_steps == 0 or schedule.max_steps < -1:
        yield f"--max_steps must be above 0, or -1 to use --num_train_epochs; got {schedule.max_steps}"
    if schedule.decay_steps is not None and schedule.decay_steps <= schedule.warmup_steps:
        yield f"--decay_steps {schedule.decay_steps} must be above --warmup_steps {schedule.warmup_steps}"


def _best_model_problems(config: RunConfig) -> Iterator[str]:
    evaluation, checkpoint = config.evaluation, config.checkpoint
    wanted = []
    if evaluation.early_stopping_patience is not None:
        wanted.append("--early_stopping_patience")
    elif evaluation.early_stopping_threshold > 0:
        yield "--early_stopping_threshold needs --early_stopping_patience"
    if checkpoint.load_best_model_at_end:
        wanted.append("--load_best_model_at_end")
        if checkpoint.save_strategy == "no":
            yield "--load_best_model_at_end needs checkpoints: use --save_strategy steps or epoch, not no"
    for flag in wanted:
        if evaluation.do_train and not evaluation.do_eval:
            yield f"{flag} compares evaluations: add --do_eval"
        elif not evaluation.do_train:
            yield f"{flag} is for training: add --do_train, or drop it"
    if evaluation.eval_prompts is not None and not evaluation.do_eval:
        yield "--eval_prompts are answered in evaluations: add --do_eval"
    name = best_metric(config)
    given = f"--metric_for_best_model {evaluation.metric_for_best_model}"
    metric = METRICS.get(name)
    if metric is None:
        near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"{given}: unknown metric (known: {', '.join(METRICS)}){hint}"
        return
    if metric.from_answers and not config.is_finetuning:
        yield f"{given} is a metric of fine-tuning only; pretraining reports eval_loss and eval_perplexity"
    elif metric.from_answers and not config.generates_answers:
        yield f"{given} is a metric of generated answers: add --do_generation"
    if evaluation.greater_is_better not in (None, metric.greater_is_better):
        better = "higher" if metric.greater_is_better else "lower"
        yield (
            f"--greater_is_better {evaluation.greater_is_better} is wrong: a {better} {name.removeprefix(PREFIX)} is "
            "better. Drop the flag"
        )
