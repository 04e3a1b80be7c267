"""Packed rows: which models keep the examples of a row apart, and what they get for it."""

from __future__ import annotations

from typing import Any

from oarlock.errors import ConfigError
from oarlock.families.registry import FAMILIES
from oarlock.ops.attention_backends.masks import make_dense_mask

ENDS = "attn_mask_startend_row_indices"  # of oarlock.data.examples.collate.PackCollator


def check_packing(config: Any) -> None:
    """Refuse a model in which packed examples would attend to each other.

    Args:
        config: a PaddleNLP PretrainedConfig.

    Raises:
        ConfigError: with the reason.
    """
    family = FAMILIES.get(config.model_type)
    if family is None or not (family.decoder or family.packing):
        others = ", ".join(other.name for other in FAMILIES.values() if other.decoder or other.packing)
        raise ConfigError(
            f"--packing: PaddleNLP's {config.model_type} does not take the mask and positions that keep packed "
            f"examples apart ({others} do): drop --packing"
        )


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
    return others | {"attention_mask": make_dense_mask(ends.shape[1], ends.shape[1], ends)}
