"""Mixtures of experts in training: their load balancing loss, and the load of their experts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
from paddle import nn

from oarlock.decoder.moe import MixtureOfExperts
from oarlock.environment.ranks import rank
from oarlock.families.architecture import MoE
from oarlock.parallel.object_collectives import all_gather_objects
from oarlock.parallel.plan import ParallelPlan


class ExpertBalance:
    """The mixtures of experts of this rank's model. There may be none."""

    def __init__(self, model: nn.Layer, plan: ParallelPlan) -> None:
        layers = model.sublayers(include_self=True)
        self._mixtures = [layer for layer in layers if isinstance(layer, MixtureOfExperts)]
        blocks = next((layer.architecture.blocks for layer in layers if hasattr(layer, "architecture")), ())
        self._num_mixtures = sum(isinstance(block.mlp, MoE) for block in blocks)  # of all pipeline stages
        self._plan = plan

    def begin_step(
        self, micro_batches: Sequence[Any], lengths: Sequence[Any], tokens: float, scaler: Any, delayed: bool
    ) -> None:
        """Weight the loss of the step's micro-batches by their tokens, as the loss of one large batch.

        Layers have equal shares, as in transformers, so that its factors mean the same here.

        Args:
            lengths: of the rows of each micro-batch without padding, int64 [batch].
            tokens: of all micro-batches of the step, per data-parallel replica.
            scaler: GradScaler of fp16 loss scaling, or None.
            delayed: the Trainer will divide the gradients by the number of micro-batches.
        """
        if not self._mixtures:
            return
        scale = (1.0 if scaler is None else float(scaler._scale)) * (len(micro_batches) if delayed else 1)
        widths = [batch["input_ids"].shape[1] for batch in micro_batches]
        if self._plan.pipeline > 1:  # see pipeline_step
            widths = [max(widths)] * len(widths)
        masks = [paddle.arange(width) < length.reshape([-1, 1]) for width, length in zip(widths, lengths, strict=True)]
        for mixture in self._mixtures:
            mixture.balance.begin_step(mixture.spec.aux_loss * scale / (self._num_mixtures * max(1.0, tokens)), masks)

    def read(self) -> dict[str, float]:
        """Metrics since the last call; all ranks have to call it. {} for a model without experts.

        Returns:
            aux_loss: mean of the layers' losses, before their factor; top_k if the load is even.
            expert_load_max: tokens of the busiest expert of any layer, relative to the mean.
            expert_load_entropy: mean over the layers, relative to that of an even load.
        """
        if not self._num_mixtures:
            return {}
        stage = self._plan.coordinates(rank()).pipeline
        totals: dict[tuple[int, int], Any] = defaultdict(float)  # sums over the ranks of a stage
        for of_stage, rows in all_gather_objects((stage, [mixture.balance.pop() for mixture in self._mixtures])):
            for layer, row in enumerate(rows):
                totals[of_stage, layer] += np.asarray(row)
        losses, peaks, entropies = [], [], []
        for *chosen, loss, tokens in totals.values():
            share = np.asarray(chosen) / max(1.0, sum(chosen))
            losses.append(loss / max(1.0, tokens))
            peaks.append(share.max() * len(share))
            entropies.append(-(share * np.log(np.maximum(share, 1e-30))).sum() / math.log(len(share)))
        mean = {"aux_loss": np.mean(losses), "expert_load_max": max(peaks), "expert_load_entropy": np.mean(entropies)}
        return {name: float(value) for name, value in mean.items()}
