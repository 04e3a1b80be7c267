"""Rules that span several options; what one option may be stands beside its field in schema.py."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from oarlock.config.metric_names import METRICS, PREFIX, best_metric
from oarlock.files import holds_adapter

if TYPE_CHECKING:
    from oarlock.config.schema import Config

Rule = Callable[[Any], Iterator[str]]


def cross_problems(config: Any) -> list[str]:
    """Everything the rules below find wrong with a configuration."""
    return [problem for rule in _RULES for problem in rule(config)]


def parse_split(text: str) -> tuple[float, float, float]:
    """Shares (train, evaluation, test) of "949,50,1" or "949/50/1", normalised to sum 1.

    Raises:
        ValueError: naming what is wrong with it.
    """
    words = text.replace("/", ",").split(",")
    if len(words) > 3:
        raise ValueError("has more than three parts (train, evaluation, test)")
    try:
        parts = [float(word) for word in words] + [0.0] * (3 - len(words))
    except ValueError:
        raise ValueError("must be numbers separated by commas, for example 949,50,1") from None
    if min(parts) < 0 or not 0 < sum(parts) < float("inf"):
        raise ValueError("must be shares >= 0 with a sum above 0")
    total = sum(parts)
    return parts[0] / total, parts[1] / total, parts[2] / total


def _something_to_do(config: Config) -> Iterator[str]:
    if not (config.evaluation.do_train or config.evaluation.do_eval):
        yield "nothing to do: give --do_train, --do_eval or both"


def _one_precision(config: Config) -> Iterator[str]:
    precision = config.precision
    if precision.fp16 and precision.bf16:
        yield "--fp16 and --bf16 exclude each other"
    if precision.amp_master_grad and not (precision.fp16 or precision.bf16):
        yield "--amp_master_grad needs --fp16 or --bf16"


def _learning_rates(config: Config) -> Iterator[str]:
    schedule = config.schedule
    if schedule.min_learning_rate > schedule.learning_rate:
        yield f"--min_learning_rate {schedule.min_learning_rate} is above --learning_rate {schedule.learning_rate}"
    if 0 < schedule.max_steps <= schedule.warmup_steps:
        yield f"--warmup_steps {schedule.warmup_steps} leaves no step of --max_steps {schedule.max_steps}"
    if schedule.max_steps == 0 or schedule.max_steps < -1:
        yield f"--max_steps must be above 0, or -1 to use --num_train_epochs; got {schedule.max_steps}"
    if schedule.decay_steps is not None and schedule.decay_steps <= schedule.warmup_steps:
        yield f"--decay_steps {schedule.decay_steps} must be above --warmup_steps {schedule.warmup_steps}"


def _split(config: Config) -> Iterator[str]:
    text = getattr(config.data, "split", None)
    if text is None:
        return
    try:
        train, evaluation, _ = parse_split(text)
    except ValueError as error:
        yield f"--split {text} {error}"
        return
    if config.evaluation.do_train and train == 0:
        yield f"--split {text} leaves no documents for training, which --do_train asks for"
    if config.evaluation.do_eval and evaluation == 0:
        yield f"--split {text} leaves no documents for evaluation, which --do_eval asks for"


def _scratch_only(config: Config) -> Iterator[str]:
    model = config.model
    if not getattr(model, "continue_training", False):
        return
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for name in (*sizes, "vocab_size"):
        if getattr(model, name) is not None:
            yield f"--{name} changes the model and can't go with --continue_training, which loads its weights"


def _packing(config: Config) -> Iterator[str]:
    data = config.data
    if getattr(data, "packing_length", None) is not None and not getattr(data, "packing", False):
        yield f"--packing_length {getattr(data, 'packing_length', None)} needs --packing"
    for name in ("prefix_tuning", "p_tuning"):
        if getattr(data, "packing", False) and getattr(getattr(config, "method", None), name):
            yield f"--packing can't go with --{name}, whose tokens stand once before a row: leave one of them out"


def _sequence_parallel(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.sequence_parallel and parallel.tensor_parallel_degree <= 1:
        yield "--sequence_parallel needs --tensor_parallel_degree above 1"
    if parallel.virtual_pp_degree > 1 and parallel.pipeline_parallel_degree <= 1:
        yield "--virtual_pp_degree above 1 needs --pipeline_parallel_degree above 1"


_METHODS = ("lora", "qlora", "prefix_tuning", "p_tuning")


def _methods(config: Config) -> Iterator[str]:
    method = getattr(config, "method", None)
    if method is None:
        return
    chosen = [f"--{name}" for name in _METHODS if getattr(method, name)]
    if method.lora and method.qlora:  # QLoRA is a LoRA
        chosen.remove("--lora")
    if len(chosen) > 1:
        yield f"{' and '.join(chosen)} exclude each other: choose one method"
    for name in ("prefix_tuning", "p_tuning"):
        if getattr(method, name) and config.parallel.pipeline_parallel_degree > 1:
            why = {
                "prefix_tuning": "the stages of PaddleNLP's pipelines take no keys and values from outside",
                "p_tuning": "only the first stage would have anything to train",
            }[name]
            yield f"--{name} can't go with --pipeline_parallel_degree: {why}; use --lora, or other kinds of parallelism"
    # An adapter that is named says its method itself (oarlock.train.start_from_adapter).
    adapter_says = not chosen and (method.adapter_name_or_path or holds_adapter(config.model.model_name_or_path))
    if method.merge_weights and not (method.lora or method.qlora or adapter_says):
        yield "--merge_weights needs --lora or --qlora: only its matrices can be added to the base model's weights"
    if method.merge_weights and not config.evaluation.do_train:
        yield "--merge_weights merges at the end of a training: give --do_train, or use `oarlock merge` for an adapter"


def _resume(config: Config) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.overwrite_output_dir and checkpoint.resume_from_checkpoint:
        yield "--overwrite_output_dir starts anew and --resume_from_checkpoint goes on: give one of them"


def _best_model(config: Config) -> Iterator[str]:
    evaluation, checkpoint = config.evaluation, config.checkpoint
    wanted = []
    if evaluation.early_stopping_patience is not None:
        wanted.append("--early_stopping_patience")
    elif evaluation.early_stopping_threshold > 0:
        yield "--early_stopping_threshold has no meaning without --early_stopping_patience"
    if checkpoint.load_best_model_at_end:
        wanted.append("--load_best_model_at_end")
        if checkpoint.save_strategy == "no":
            yield "--load_best_model_at_end needs checkpoints, which --save_strategy no forbids: use steps or epoch"
    for flag in wanted:
        if evaluation.do_train and not evaluation.do_eval:
            yield f"{flag} compares evaluations: give --do_eval too"
        elif not evaluation.do_train:
            yield f"{flag} is for training: give --do_train too, or leave it out"
    if evaluation.eval_prompts is not None and not evaluation.do_eval:
        yield "--eval_prompts are answered at evaluations: give --do_eval too"
    yield from _metric(config)


def _metric(config: Config) -> Iterator[str]:
    evaluation, name = config.evaluation, best_metric(config)
    given = f"--metric_for_best_model {evaluation.metric_for_best_model}"
    metric = METRICS.get(name)
    if metric is None:
        near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"{given}: no evaluation gives it (known: {', '.join(METRICS)}){hint}"
        return
    if metric.from_answers and not hasattr(evaluation, "do_generation"):
        yield f"{given} is a figure of fine-tuning; pretraining gives eval_loss and eval_perplexity"
    elif metric.from_answers and not getattr(evaluation, "do_generation", False):
        yield f"{given} is a figure of the model's answers: give --do_generation too"
    if evaluation.greater_is_better not in (None, metric.greater_is_better):
        better = "more" if metric.greater_is_better else "less"
        yield (
            f"--greater_is_better {evaluation.greater_is_better}, but {better} {name.removeprefix(PREFIX)} is better: "
            "leave the flag out"
        )


_RULES: tuple[Rule, ...] = (
    _something_to_do,
    _one_precision,
    _learning_rates,
    _split,
    _scratch_only,
    _packing,
    _sequence_parallel,
    _methods,
    _resume,
    _best_model,
)
