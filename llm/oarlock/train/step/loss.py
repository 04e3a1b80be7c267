"""The training loss: cross entropy, averaged over the trained tokens of a whole optimizer step."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn
from paddle.distributed import fleet

from oarlock.data.examples.labels import IGNORE_INDEX
from oarlock.ops.linear_cross_entropy import DeferredLogits


class TokenCrossEntropy(nn.Layer):
    """Sum of -log p(label) over the trained tokens, divided by `normalizer`.

    PaddleNLP's criteria divide by the tokens of the micro-batch, so that with uneven lengths a token weighs less the
    longer its micro-batch is. Here the trainer sets `normalizer` to the trained tokens of all micro-batches and ranks
    of a step, so the accumulated gradient is that of one large batch.

    Args:
        split_vocabulary: the logits are this rank's shard of the vocabulary (tensor parallelism).
    """

    def __init__(self, split_vocabulary: bool = False) -> None:
        super().__init__()
        self.normalizer = 1.0
        self._parallel = (
            fleet.meta_parallel.ParallelCrossEntropy(ignore_index=IGNORE_INDEX) if split_vocabulary else None
        )

    def forward(self, logits: Any, labels: paddle.Tensor) -> paddle.Tensor:
        """Compute the scalar float32 loss.

        Args:
            logits: [batch, tokens, vocabulary] (or the model's output tuple that begins with them), or HeldScores.
            labels: [batch, tokens], already shifted; IGNORE_INDEX where nothing is trained.
        """
        scores = logits[0] if isinstance(logits, (tuple, list)) else logits
        if isinstance(scores, DeferredLogits):
            return scores.cross_entropy(labels, 1 / self.normalizer, IGNORE_INDEX)
        return self.token_losses(logits, labels).sum() / self.normalizer

    def token_losses(self, logits: paddle.Tensor | tuple[paddle.Tensor, ...], labels: paddle.Tensor) -> paddle.Tensor:
        """Compute the loss of every token: float32 [batch, tokens], 0 for tokens that are not trained."""
        scores = logits[0] if isinstance(logits, (tuple, list)) else logits
        with paddle.amp.auto_cast(False):
            scores, labels = scores.astype("float32"), labels.unsqueeze(-1)
            if self._parallel is not None:
                losses = self._parallel(scores, labels)
            else:
                losses = nn.functional.cross_entropy(scores, labels, reduction="none", ignore_index=IGNORE_INDEX)
        return losses.squeeze(-1)


def count_trained_tokens(labels: paddle.Tensor) -> int:
    """Count the labels that are not IGNORE_INDEX."""
    return int((labels != IGNORE_INDEX).sum())
