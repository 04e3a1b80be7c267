"""Packed rows: which models keep the examples of a row apart, and what they get for it."""

from __future__ import annotations

import os
from typing import Any

from oarlock.errors import ConfigError
from oarlock.families.registry import FAMILIES
from oarlock.ops.attention_backends.masks import dense_mask

ENDS = "attn_mask_startend_row_indices"  # of oarlock.data.examples.collate.PackCollator


def check_packing(config: Any, pipeline: bool = False) -> None:
    """Refuse a model in which packed examples would attend to each other.

    Args:
        config: a PaddleNLP PretrainedConfig.
        pipeline: the model is split into stages.

    Raises:
        ConfigError: with the reason.
    """
    family = FAMILIES.get(config.model_type)
    if family is not None and family.decoder is not None:
        return
    packing = family.packing if family is not None else None
    if packing is None:
        others = ", ".join(other.name for other in FAMILIES.values() if other.decoder or other.packing)
        raise ConfigError(
            f"--packing: PaddleNLP's {config.model_type} does not take the mask and positions that keep packed "
            f"examples apart ({others} do): drop --packing"
        )
    if pipeline and not packing.in_pipeline:
        raise ConfigError(
            f"--packing: PaddleNLP's pipeline stages of {config.model_type} drop the positions: drop --packing, "
            "or use --pipeline_parallel_degree 1"
        )
    if os.environ.get("USE_CASUAL_MASK", "False") == "True":  # PaddleNLP's get_use_casual_mask
        raise ConfigError("--packing: the environment variable USE_CASUAL_MASK=True drops every mask; unset it")


def adapt_attention_mask(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return a model's inputs, for packed rows with the mask in the form that the model accepts.

    Our decoder gets the ends of the examples, and PaddleNLP's models a mask [batch, tokens, tokens].

    Args:
        inputs: of a batch. It has ENDS if its rows are packed.
    """
    ends, family = inputs.get(ENDS), FAMILIES.get(model.config.model_type)
    if ends is None or (family is not None and family.decoder is not None):
        return inputs
    others = {name: value for name, value in inputs.items() if name != ENDS}
    return others | {"attention_mask": dense_mask(ends.shape[1], ends.shape[1], ends)}
