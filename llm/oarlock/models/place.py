"""Tell a model's configuration which part of the model this rank builds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oarlock.models.build import ModelSource
    from oarlock.parallel.plan import ParallelPlan


def place_model(source: ModelSource, plan: ParallelPlan, rank: int) -> None:
    """Set the fields from which PaddleNLP's model classes build a rank's part.

    tensor_parallel_output leaves the scores split over the vocabulary, as ParallelCrossEntropy takes them.
    """
    config = source.config
    config.tensor_parallel_degree = plan.tensor
    config.tensor_parallel_rank = plan.coordinates(rank).tensor
    config.tensor_parallel_output = plan.tensor > 1
    config.sequence_parallel = plan.sequence_parallel
    config.virtual_pp_degree = plan.virtual_pipeline
