"""The load of a layer's experts in training, and the loss that keeps it even."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import paddle
from paddle.autograd import PyLayer

from oarlock.decoder.router import Routing
from oarlock.typing import Tensor


class _AddLoss(PyLayer):
    """Return x, and give the loss a gradient of 1 wherever x gets one (Megatron-LM's MoEAuxLossAutoScaler)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return paddle.assign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, paddle.ones([])


class LoadBalance:
    """The load of the experts of one layer, without padding.

    The loss of a micro-batch is experts x sum(f_e p_e), with f_e the choices of expert e per token and p_e its mean
    probability (Switch Transformer, https://arxiv.org/abs/2101.03961, equation 4). That is transformers'
    load_balancing_loss_func for one layer; it is top_k if the load is even. For several layers transformers multiplies
    the means over all layers, in which the imbalances of layers cancel. Here every layer has its own loss,
    because a pipeline stage knows only its own layers.

    The loss is not added to that of the model: only its gradient is, at the router. So it works in any pipeline stage.
    """

    def __init__(self, experts: int) -> None:
        self._experts, self._factor = experts, 0.0
        self._masks: Iterator[Tensor] = iter(())
        self._totals: Tensor | None = None

    def begin_step(self, factor: float, masks: Iterable[Tensor]) -> None:
        """Begin an optimizer step.

        Args:
            factor: of the loss, per token; 0 for none.
            masks: of each micro-batch, bool [batch, tokens], False for padding.
        """
        self._factor, self._masks = factor, iter(masks)

    def take_mask(self) -> Tensor | None:
        """The mask of the next micro-batch; None: it has no padding."""
        return next(self._masks, None)

    def add(self, routing: Routing, counted: Tensor | None) -> Tensor:
        """Add a micro-batch; returns the routing's weights, whose gradient carries that of the loss.

        Args:
            counted: bool [batch, tokens], False for padding; None: there is none. It is not used if rows are longer,
                by the virtual tokens of p-tuning.
        """
        with paddle.amp.auto_cast(False):
            probabilities, ones = routing.probabilities, paddle.ones_like(routing.weights)
            if counted is not None and counted.size == len(routing.weights):
                mask = counted.reshape([-1, 1]).astype("float32")
                probabilities, ones = probabilities * mask, ones * mask
            with paddle.no_grad():
                chosen = paddle.bincount(routing.experts.flatten(), ones.flatten(), self._experts).astype("float32")
                tokens = (ones.sum() / ones.shape[-1]).clip(min=1.0)
            loss = (chosen * probabilities.sum(0)).sum() * (self._experts / tokens)  # of the sum of tokens
            totals = paddle.concat([chosen, paddle.stack([loss.detach(), tokens])]).astype("float64")
            self._totals = totals if self._totals is None else self._totals + totals
            if not self._factor or loss.stop_gradient:
                return routing.weights
            return _AddLoss.apply(routing.weights, loss * self._factor)

    def pop(self) -> list[float]:
        """Return the sums since the last call, and reset them.

        Returns:
            The choices of each expert, then the sum of the losses over tokens, then the number of tokens.
        """
        totals, self._totals = self._totals, None
        return [0.0] * (self._experts + 2) if totals is None else totals.tolist()
