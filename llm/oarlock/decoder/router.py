"""The router of a mixture of experts: it chooses the experts of each token and their weights."""

from __future__ import annotations

from typing import NamedTuple

import paddle
from paddle import nn
from paddle.nn import functional

from oarlock.families.architecture import MoE
from oarlock.typing import Tensor


class Routing(NamedTuple):
    """The choice of a router.

    Attributes:
        weights: float32 [tokens, top_k], of the chosen experts.
        experts: int64 [tokens, top_k], their numbers.
        probabilities: float32 [tokens, experts]; they sum to 1.
    """

    weights: Tensor
    experts: Tensor
    probabilities: Tensor


class Router(nn.Linear):
    """Scores every expert for every token. Its weights are those of a linear layer, [hidden, experts].

    With MoE.bias_corrected it also has the correction of the choice, a parameter without a gradient. It is loaded,
    saved and used, but not trained.
    """

    def __init__(self, spec: MoE, hidden: int) -> None:
        super().__init__(hidden, spec.experts, bias_attr=False)
        if spec.bias_corrected:
            self.e_score_correction_bias = self.create_parameter(
                [spec.experts], dtype="float32", default_initializer=nn.initializer.Constant(0.0)
            )
            self.e_score_correction_bias.stop_gradient = True

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[tokens, hidden] -> logits, float32 [tokens, experts], and the correction [experts] if there is one.

        bfloat16 could not tell close experts apart. The correction is a copy: where layers are in memory only while
        they run, the parameter itself is gone afterwards.
        """
        with paddle.amp.auto_cast(False):
            logits = functional.linear(x.astype("float32"), self.weight.astype("float32"))
        correction = getattr(self, "e_score_correction_bias", None)
        return logits if correction is None else (logits, correction.clone())


def choose_experts(logits: Tensor, spec: MoE, correction: Tensor | None = None) -> Routing:
    """Choose the experts of every token.

    Sources: Mixtral (https://arxiv.org/abs/2401.04088, section 2.1) for softmax routers, DeepSeek-V3
    (https://arxiv.org/abs/2412.19437, section 2.1.2) for sigmoid routers, groups and the corrected choice.

    Args:
        logits: float32 [tokens, experts].
        correction: float32 [experts], added to the scores for the choice alone.
    """
    with paddle.amp.auto_cast(False):
        if spec.router == "softmax":
            scores = probabilities = functional.softmax(logits, axis=-1)
        else:
            scores = functional.sigmoid(logits)
            probabilities = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        with paddle.no_grad():
            ranked = scores if correction is None else scores + correction.astype("float32")
            if spec.groups > 1:
                ranked = _leave_best_groups(ranked, spec)
            chosen = paddle.topk(ranked, spec.top_k, axis=-1)[1]
        weights = paddle.take_along_axis(scores, chosen, axis=-1)
        if spec.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if spec.weight_scale != 1.0:
            weights = weights * spec.weight_scale
    return Routing(weights, chosen, probabilities)


def _leave_best_groups(scores: Tensor, spec: MoE) -> Tensor:
    """Set the scores outside the best groups to -inf; [tokens, experts]."""
    grouped = scores.reshape([-1, spec.groups, spec.experts // spec.groups])
    best = paddle.topk(grouped, 1 if spec.group_score == "max" else 2, axis=-1)[0].sum(-1)
    chosen = paddle.topk(best, spec.top_groups, axis=-1)[1]
    keep = functional.one_hot(chosen, spec.groups).sum(1).unsqueeze(-1)
    return paddle.where(keep > 0, grouped, paddle.full_like(grouped, -float("inf"))).reshape([-1, spec.experts])
