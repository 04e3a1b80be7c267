"""The one place where PaddleNLP's model classes are called."""

from __future__ import annotations

from functools import reduce
from typing import Any

from paddlenlp.transformers import PretrainedConfig, PretrainedModel

from oarlock.families.registry import FAMILIES
from oarlock.ops import corrections


def construct(model_class: Any, config: PretrainedConfig, dtype: str) -> PretrainedModel:
    """A model without an adapter and, under oarlock.models.init_weights.without_values, without values.

    PaddleNLP's OPT has an output layer of its own whatever its configuration says (3.0.0b4); here it is tied to the
    input embedding where `tie_word_embeddings` says so, as transformers does it.

    Args:
        config: its `dtype` becomes the one given: a checkpoint's own type is not that of the run, and what PaddleNLP
            and the fine-tuning methods add beside the layers goes by the configuration.
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
