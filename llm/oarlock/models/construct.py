"""Construct models, with and without values. The one place where their classes are called."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import paddle
from paddle import nn
from paddle.distributed.fleet.meta_parallel import PipelineLayer
from paddlenlp.transformers import PretrainedConfig, PretrainedModel
from paddlenlp.transformers.model_utils import no_init_weights

from oarlock.compat.patch import replaced
from oarlock.families.registry import FAMILIES
from oarlock.ops import corrections


def construct(model_class: Any, config: PretrainedConfig, dtype: str) -> PretrainedModel:
    """Construct a model without an adapter and, inside without_values(), without values.

    PaddleNLP's OPT always has an output layer of its own (3.0.0b4). As in transformers, it is tied to the input
    embedding where `tie_word_embeddings` says so.

    Args:
        config: its `dtype` is set to the one given. A checkpoint's own type is not that of the run, and what PaddleNLP
            and the fine-tuning methods add to layers follows the configuration.
        dtype: of the parameters.
    """
    corrections.install()
    config.dtype = dtype
    model: PretrainedModel = model_class._from_config(config, dtype=dtype)
    family = FAMILIES.get(config.model_type)
    if family is not None and family.tied_parameters and config.tie_word_embeddings:
        (*layers, name), embedding = family.tied_parameters[0].split("."), family.tied_parameters[1]
        setattr(reduce(getattr, layers, model), name, reduce(getattr, embedding.split("."), model))
    return model


@contextmanager
def without_values() -> Iterator[None]:
    """Construct models whose parameters have neither memory nor values, whatever their constructors do.

    Some constructors call `self.apply(self._init_weights)` themselves, and pipelines send shared parameters
    to other stages (3.0.0b4). Both would need values.
    """
    with (
        no_init_weights(),
        paddle.LazyGuard(),
        replaced((nn.Layer, "apply"), by=lambda layer, function: layer),
        replaced((PipelineLayer, "_synchronize_shared_weights"), by=lambda layer: None),
    ):
        yield


def unsplit_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of the configuration for the model on one card."""
    unsplit = copy.deepcopy(config)
    unsplit.tensor_parallel_degree, unsplit.tensor_parallel_rank = 1, 0
    unsplit.expert_parallel_degree, unsplit.expert_parallel_rank = 1, 0
    unsplit.tensor_parallel_output, unsplit.sequence_parallel, unsplit.virtual_pp_degree = True, False, 1
    return unsplit
