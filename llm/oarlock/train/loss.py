"""The training loss: cross entropy summed over trained tokens and divided by how many the whole step has."""

from __future__ import annotations

import paddle
from paddle import nn

from oarlock.data.labels import IGNORE_INDEX


class TokenCrossEntropy(nn.Layer):
    """sum over trained tokens of -log p(label) / normalizer.

    PaddleNLP's criteria divide by the tokens of the micro-batch, so that with uneven lengths a token weighs less the
    more of them its micro-batch holds. Here the trainer sets `normalizer` before a step to the trained tokens of all
    its micro-batches and ranks, and the accumulated gradient is that of one big batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.normalizer = 1.0

    def forward(self, logits: paddle.Tensor | tuple[paddle.Tensor, ...], labels: paddle.Tensor) -> paddle.Tensor:
        """Scalar float32 loss.

        Args:
            logits: [batch, tokens, vocabulary] (or the model's output tuple that begins with them).
            labels: [batch, tokens], already shifted; IGNORE_INDEX where nothing is trained.
        """
        return self.token_losses(logits, labels).sum() / self.normalizer

    def token_losses(self, logits: paddle.Tensor | tuple[paddle.Tensor, ...], labels: paddle.Tensor) -> paddle.Tensor:
        """float32 [batch, tokens], 0 where nothing is trained."""
        scores = logits[0] if isinstance(logits, (tuple, list)) else logits
        with paddle.amp.auto_cast(False):
            losses = nn.functional.cross_entropy(
                scores.astype("float32"), labels.unsqueeze(-1), reduction="none", ignore_index=IGNORE_INDEX
            )
        return losses.squeeze(-1)


def trained_tokens(labels: paddle.Tensor) -> int:
    """How many labels a loss is computed for."""
    return int((labels != IGNORE_INDEX).sum())
