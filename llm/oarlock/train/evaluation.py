"""Held-out loss, exact per trained token over the whole set (the Trainer means batch means), and perplexity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import paddle
from paddlenlp.trainer.trainer_utils import EvalLoopOutput

from oarlock.train.loss import trained_tokens

if TYPE_CHECKING:
    from oarlock.train.trainer import OarlockTrainer


class EvaluationStopped(Exception):
    """SIGTERM came during an evaluation: it is given up, so that the checkpoint is written in time."""


def evaluate_tokens(trainer: OarlockTrainer, dataloader: Any, prefix: str, limit: int) -> EvalLoopOutput:
    """Loss, perplexity and number of tokens, and what trainer.generation_metrics adds.

    Args:
        prefix: of the metric names, "eval".
        limit: batches at most; -1 for all.

    Raises:
        EvaluationStopped: on SIGTERM.
    """
    model = trainer.model
    model.eval()
    total, tokens, samples = 0.0, 0, 0
    trainer.callback_handler.eval_dataloader = dataloader
    with paddle.no_grad():
        for step, batch in enumerate(dataloader):
            if 0 < limit <= step:
                break
            if trainer.stop.requested:
                raise EvaluationStopped
            batch.pop("num_tokens")
            labels = batch.pop("labels")
            with trainer.autocast_smart_context_manager():
                losses = trainer.criterion.token_losses(model(**trainer._prepare_inputs(batch)), labels)
            real = dataloader.batch_sampler.real(step)
            total += float(losses[:real].sum(dtype="float64"))
            tokens += trained_tokens(labels[:real])
            samples += real
            trainer.control = trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
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
