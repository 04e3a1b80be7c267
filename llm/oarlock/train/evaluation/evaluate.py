"""Held-out loss and perplexity, averaged over trained tokens (the Trainer averages the means of batches)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import paddle
from paddle import nn

from oarlock.data.corpus.blend import ConcatenatedDataset
from oarlock.data.examples.labels import IGNORE_INDEX
from oarlock.train.step.forward_context import Batch, ForwardContext
from oarlock.train.step.loss import TokenCrossEntropy, count_trained_tokens
from oarlock.train.step.pipeline_step import sum_pipeline_losses


class EvaluationStopped(Exception):
    """SIGTERM interrupted an evaluation, so that the checkpoint can be written in time."""


class LossSum(Protocol):
    """Adds up the token losses of batches."""

    def add(self, batch: Batch) -> None:
        """Add the losses of a batch."""

    def pop(self) -> float:
        """The sum since the last call."""


class ModelLoss:
    """Token losses of a model that is not split into pipeline stages."""

    def __init__(self, model: nn.Layer, criterion: TokenCrossEntropy, context: ForwardContext) -> None:
        self._model, self._criterion, self._context = model, criterion, context
        self._total = 0.0
        model.eval()

    def add(self, batch: Batch) -> None:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with self._context.autocast():
            logits = self._model(**self._context.prepare(inputs))
            losses = self._criterion.token_losses(logits, batch["labels"])
        self._total += float(losses.sum(dtype="float64"))

    def pop(self) -> float:
        total, self._total = self._total, 0.0
        return total


class PipelineLoss:
    """Token losses through a pipeline, which takes as many batches at once as a step has micro-batches."""

    def __init__(self, model: Any, criterion: TokenCrossEntropy, context: ForwardContext) -> None:
        self._model, self._criterion, self._context = model, criterion, context
        self._total = 0.0
        self._waiting: list[Batch] = []

    def add(self, batch: Batch) -> None:
        self._waiting.append(batch)
        if len(self._waiting) == self._model.accumulate_steps:
            self._flush()

    def pop(self) -> float:
        if self._waiting:
            self._flush()
        total, self._total = self._total, 0.0
        return total

    def _flush(self) -> None:
        self._total += sum_pipeline_losses(self._model, self._waiting, self._criterion, self._context)
        self._waiting = []


@paddle.no_grad()
def evaluate(
    loss_sum: LossSum,
    batches: Any,
    *,
    reduce: Callable[[Sequence[float]], list[float]],
    should_stop: Callable[[], bool],
    on_batch: Callable[[], None],
) -> tuple[dict[str, float], float]:
    """Compute loss, perplexity and number of tokens of a held-out set.

    With several held-out sets, each also has its own loss (loss_NAME). The overall loss is their mean, weighted by
    the shares that they have in training.

    Args:
        batches: data loader with an EvaluationBatchSampler.
        reduce: sums numbers over the data-parallel ranks.
        should_stop: called before every batch.
        on_batch: called after every batch.

    Returns:
        The metrics, and the number of samples.

    Raises:
        EvaluationStopped: if should_stop() returns True.
    """
    sampler, dataset = batches.batch_sampler, batches.dataset
    names = dataset.names if isinstance(dataset, ConcatenatedDataset) else [""]
    shares = dataset.shares if isinstance(dataset, ConcatenatedDataset) else [1.0]
    totals, tokens, samples, last = [0.0] * len(names), [0] * len(names), 0, 0
    for step, batch in enumerate(batches):
        if should_stop():
            raise EvaluationStopped
        part = sampler.find_dataset(step)
        if part != last:
            totals[last], last = loss_sum.pop(), part
        batch.pop("num_tokens")
        real = sampler.count_real(step)
        batch["labels"][real:] = IGNORE_INDEX  # padding of the last batch
        tokens[part] += count_trained_tokens(batch["labels"])
        loss_sum.add(batch)
        samples += real
        on_batch()
    totals[last] = loss_sum.pop()
    sums = reduce([*totals, *tokens, samples])
    totals, counts, samples = sums[: len(names)], [round(n) for n in sums[len(names) : -1]], round(sums[-1])
    losses = [total / max(1, count) for total, count in zip(totals, counts, strict=True)]
    seen = [share if count else 0.0 for share, count in zip(shares, counts, strict=True)]
    loss = sum(share * value for share, value in zip(seen, losses, strict=True)) / (sum(seen) or 1.0)
    metrics: dict[str, float] = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": sum(counts),
    }
    if len(names) > 1:
        words = [re.sub(r"[^\w./-]+", "_", name) for name in names]
        metrics |= {f"loss_{word}": value for word, value in zip(words, losses, strict=True)}
    return metrics, samples
