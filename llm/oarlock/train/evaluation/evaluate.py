"""Held-out loss, exact per trained token over the whole set (the Trainer means batch means), and perplexity."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paddle
from paddlenlp.trainer.trainer_utils import EvalLoopOutput

from oarlock.data.corpus.blend import ConcatenatedDataset
from oarlock.data.examples.labels import IGNORE_INDEX
from oarlock.environment.console import get_logger
from oarlock.parallel.object_collectives import all_gather_objects
from oarlock.train.loss import trained_tokens
from oarlock.train.pipeline_step import pipeline_loss_sum

if TYPE_CHECKING:
    from oarlock.train.trainer import OarlockTrainer

logger = get_logger(__name__)


class EvaluationStopped(Exception):
    """SIGTERM came during an evaluation: it is given up, so that the checkpoint is written in time."""


class _Loss:
    """Sum of the token losses of batches since the last `take`."""

    def __init__(self, trainer: OarlockTrainer) -> None:
        self.trainer, self.total = trainer, 0.0
        trainer.model.eval()

    def add(self, batch: dict[str, paddle.Tensor]) -> None:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with self.trainer.autocast_smart_context_manager():
            scores = self.trainer.model(**self.trainer._prepare_inputs(inputs))
            losses = self.trainer.criterion.token_losses(scores, batch["labels"])
        self.total += float(losses.sum(dtype="float64"))

    def take(self) -> float:
        total, self.total = self.total, 0.0
        return total


class _PipelineLoss:
    """The same through a pipeline, as many batches at once as a step has micro-batches."""

    def __init__(self, trainer: OarlockTrainer) -> None:
        self.trainer, self.model, self.total = trainer, trainer.pipeline_model(), 0.0
        self.waiting: list[dict[str, paddle.Tensor]] = []

    def add(self, batch: dict[str, paddle.Tensor]) -> None:
        self.waiting.append(batch)
        if len(self.waiting) == self.model.accumulate_steps:
            self._flush()

    def take(self) -> float:
        if self.waiting:
            self._flush()
        total, self.total = self.total, 0.0
        return total

    def _flush(self) -> None:
        self.total += pipeline_loss_sum(self.trainer, self.model, self.waiting)
        self.waiting = []


def evaluate_tokens(trainer: OarlockTrainer, dataloader: Any, prefix: str) -> EvalLoopOutput:
    """Loss, perplexity and number of tokens, and what trainer.generation_metrics adds.

    Of several held-out sets each has its own loss (eval_loss_NAME); the loss of all is their mean, weighted by the
    shares they are trained with.

    Args:
        prefix: of the metric names, "eval".

    Raises:
        EvaluationStopped: on SIGTERM.
    """
    forward = _PipelineLoss(trainer) if trainer.plan.pipeline > 1 else _Loss(trainer)
    sampler, dataset = dataloader.batch_sampler, dataloader.dataset
    names = dataset.names if isinstance(dataset, ConcatenatedDataset) else [""]
    shares = dataset.shares if isinstance(dataset, ConcatenatedDataset) else [1.0]
    totals, tokens, samples, last = [0.0] * len(names), [0] * len(names), 0, 0
    trainer.callback_handler.eval_dataloader = dataloader
    with paddle.no_grad():
        for step, batch in enumerate(dataloader):
            if trainer.any_rank_stopping():
                raise EvaluationStopped
            part = sampler.part(step)
            if part != last:
                totals[last], last = forward.take(), part
            batch.pop("num_tokens")
            real = sampler.real(step)
            batch["labels"][real:] = IGNORE_INDEX  # fillers, where the samples end
            tokens[part] += trained_tokens(batch["labels"])
            forward.add(batch)
            samples += real
            trainer.control = trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
        totals[last] = forward.take()
    sums = trainer.sum_over_data_ranks([*totals, *tokens, samples])
    totals, counts, samples = sums[: len(names)], [round(n) for n in sums[len(names) : -1]], round(sums[-1])
    losses = [total / max(1, count) for total, count in zip(totals, counts, strict=True)]
    seen = [share if count else 0.0 for share, count in zip(shares, counts, strict=True)]
    loss = sum(share * value for share, value in zip(seen, losses, strict=True)) / (sum(seen) or 1.0)
    metrics: dict[str, float] = {
        f"{prefix}_loss": loss,
        f"{prefix}_perplexity": math.exp(min(loss, 700.0)),
        f"{prefix}_tokens": sum(counts),
    }
    if len(names) > 1:
        metrics |= {f"{prefix}_loss_{_word(name)}": value for name, value in zip(names, losses, strict=True)}
    if trainer.generation_metrics is not None:
        metrics |= {f"{prefix}_{name}": value for name, value in trainer.generation_metrics(trainer).items()}
    return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=samples)


def _word(name: str) -> str:
    """A set's name within that of a figure."""
    return re.sub(r"[^\w./-]+", "_", name)


def judge(trainer: OarlockTrainer, metrics: dict[str, float]) -> None:
    """Is this evaluation the best so far (then it may have to be saved), and is it time to stop?"""
    step, best, control = trainer.state.global_step, trainer.best, trainer.control
    value = all_gather_objects(metrics[best.metric])[0]  # rank 0's: a last bit that differs must not part the ranks
    if best.see(value, step, Path(trainer.args.output_dir) / f"checkpoint-{step}") and best.keep:
        control.should_save = True
    if best.exhausted and step < trainer.state.max_steps:
        logger.info(f"stopping early at step {step}: {best.describe()}; {best.evaluations_since} evaluation(s) since")
        control.should_training_stop = True
        control.should_save = control.should_save or trainer.config.checkpoint.save_strategy != "no"


def make_up_evaluation(trainer: OarlockTrainer) -> None:
    """At the start of a resumed run: the evaluation that SIGTERM took from the step of its checkpoint."""
    if not trainer.progress.owes_evaluation:
        return
    metrics = trainer.evaluate()
    stopped_again = not metrics
    if not stopped_again:
        trainer.progress.owes_evaluation = False
        judge(trainer, metrics)
        trainer._save_checkpoint(trainer.model, metrics)  # in place of the one that owes it
    if stopped_again or trainer.control.should_training_stop:
        trainer.callback_handler.train_dataloader.batch_sampler.steps_left = 0
