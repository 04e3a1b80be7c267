"""The training loss: cross entropy summed over trained tokens and divided by how many the whole step has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import paddle
from paddle import nn
from paddle.distributed import fleet

from oarlock.data.examples.labels import IGNORE_INDEX
from oarlock.ops.linear_cross_entropy import DeferredLogits


class TokenCrossEntropy(nn.Layer):
    """sum over trained tokens of -log p(label) / normalizer.

    PaddleNLP's criteria divide by the tokens of the micro-batch, so that with uneven lengths a token weighs less the
    more of them its micro-batch holds. Here the trainer sets `normalizer` before a step to the trained tokens of all
    its micro-batches and ranks, and the accumulated gradient is that of one big batch.

    Args:
        split_vocabulary: the scores are this rank's part of the vocabulary (tensor parallel).
    """

    def __init__(self, split_vocabulary: bool = False) -> None:
        super().__init__()
        self.normalizer = 1.0
        self._parallel = (
            fleet.meta_parallel.ParallelCrossEntropy(ignore_index=IGNORE_INDEX) if split_vocabulary else None
        )

    def forward(self, logits: Any, labels: paddle.Tensor) -> paddle.Tensor:
        """Scalar float32 loss.

        Args:
            logits: [batch, tokens, vocabulary] (or the model's output tuple that begins with them), or HeldScores.
            labels: [batch, tokens], already shifted; IGNORE_INDEX where nothing is trained.
        """
        scores = logits[0] if isinstance(logits, (tuple, list)) else logits
        if isinstance(scores, DeferredLogits):
            return scores.cross_entropy(labels, 1 / self.normalizer, IGNORE_INDEX)
        return self.token_losses(logits, labels).sum() / self.normalizer

    @contextlib.contextmanager
    def normalized_by(self, normalizer: float) -> Iterator[None]:
        """Use another normalizer inside the context."""
        before, self.normalizer = self.normalizer, normalizer
        try:
            yield
        finally:
            self.normalizer = before

    def token_losses(self, logits: paddle.Tensor | tuple[paddle.Tensor, ...], labels: paddle.Tensor) -> paddle.Tensor:
        """float32 [batch, tokens], 0 where nothing is trained."""
        scores = logits[0] if isinstance(logits, (tuple, list)) else logits
        with paddle.amp.auto_cast(False):
            scores, labels = scores.astype("float32"), labels.unsqueeze(-1)
            if self._parallel is not None:
                losses = self._parallel(scores, labels)
            else:
                losses = nn.functional.cross_entropy(scores, labels, reduction="none", ignore_index=IGNORE_INDEX)
        return losses.squeeze(-1)


def trained_tokens(labels: paddle.Tensor) -> int:
    """How many labels a loss is computed for."""
    return int((labels != IGNORE_INDEX).sum())
