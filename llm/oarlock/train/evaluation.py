"""Held-out loss, exact per trained token over the whole set (the Trainer means batch means), and perplexity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paddle
from paddlenlp.trainer.trainer_utils import EvalLoopOutput

from oarlock.data.labels import IGNORE_INDEX
from oarlock.environment import say
from oarlock.parallel.sync import share
from oarlock.train.loss import trained_tokens
from oarlock.train.pipeline import pipeline_loss_sum

if TYPE_CHECKING:
    from oarlock.train.trainer import OarlockTrainer


class EvaluationStopped(Exception):
    """SIGTERM came during an evaluation: it is given up, so that the checkpoint is written in time."""


class _Loss:
    """Sum of the token losses of batches."""

    def __init__(self, trainer: OarlockTrainer) -> None:
        self.trainer, self.total = trainer, 0.0
        trainer.model.eval()

    def add(self, batch: dict[str, paddle.Tensor]) -> None:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with self.trainer.autocast_smart_context_manager():
            scores = self.trainer.model(**self.trainer._prepare_inputs(inputs))
            losses = self.trainer.criterion.token_losses(scores, batch["labels"])
        self.total += float(losses.sum(dtype="float64"))

    def sum(self) -> float:
        return self.total


class _PipelineLoss:
    """The same through a pipeline, as many batches at once as a step has micro-batches."""

    def __init__(self, trainer: OarlockTrainer) -> None:
        self.trainer, self.model, self.total = trainer, trainer.pipeline_model(), 0.0
        self.waiting: list[dict[str, paddle.Tensor]] = []

    def add(self, batch: dict[str, paddle.Tensor]) -> None:
        self.waiting.append(batch)
        if len(self.waiting) == self.model.accumulate_steps:
            self._flush()

    def sum(self) -> float:
        if self.waiting:
            self._flush()
        return self.total

    def _flush(self) -> None:
        self.total += pipeline_loss_sum(self.trainer, self.model, self.waiting)
        self.waiting = []


def evaluate_tokens(trainer: OarlockTrainer, dataloader: Any, prefix: str, limit: int) -> EvalLoopOutput:
    """Loss, perplexity and number of tokens, and what trainer.generation_metrics adds.

    Args:
        prefix: of the metric names, "eval".
        limit: batches at most; -1 for all.

    Raises:
        EvaluationStopped: on SIGTERM.
    """
    forward = _PipelineLoss(trainer) if trainer.plan.pipeline > 1 else _Loss(trainer)
    tokens, samples = 0, 0
    trainer.callback_handler.eval_dataloader = dataloader
    with paddle.no_grad():
        for step, batch in enumerate(dataloader):
            if 0 < limit <= step:
                break
            if trainer.any_rank_stopping():
                raise EvaluationStopped
            batch.pop("num_tokens")
            real = dataloader.batch_sampler.real(step)
            batch["labels"][real:] = IGNORE_INDEX  # fillers, where the samples end
            tokens += trained_tokens(batch["labels"])
            forward.add(batch)
            samples += real
            trainer.control = trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
        total = forward.sum()
    total, all_tokens, all_samples = trainer.sum_over_data_ranks([total, tokens, samples])
    tokens, samples = round(all_tokens), round(all_samples)
    loss = total / max(1, tokens)
    metrics: dict[str, float] = {
        f"{prefix}_loss": loss,
        f"{prefix}_perplexity": math.exp(min(loss, 700.0)),
        f"{prefix}_tokens": tokens,
    }
    if trainer.generation_metrics is not None:
        metrics |= {f"{prefix}_{name}": value for name, value in trainer.generation_metrics(trainer).items()}
    return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=samples)


def judge(trainer: OarlockTrainer, metrics: dict[str, float]) -> None:
    """Is this evaluation the best so far (then it may have to be saved), and is it time to stop?"""
    step, best, control = trainer.state.global_step, trainer.best, trainer.control
    value = share(metrics[best.metric])[0]  # rank 0's: a last bit that differs must not part the ranks
    if best.see(value, step, Path(trainer.args.output_dir) / f"checkpoint-{step}") and best.keep:
        control.should_save = True
    if best.exhausted and step < trainer.state.max_steps:
        say(f"stopping early at step {step}: {best.describe()}; {best.evaluations_since} evaluation(s) since")
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
