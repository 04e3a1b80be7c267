"""The one place where PaddleNLP's model classes are called."""

from __future__ import annotations

from typing import Any

from paddlenlp.transformers import PretrainedConfig, PretrainedModel

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
    if config.model_type == "opt" and config.tie_word_embeddings:
        model.lm_head.decoder_weight = model.opt.embeddings.word_embeddings.weight
    return model
