"""LoRA adapters that are served beside their base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from paddlenlp.transformers import PretrainedConfig

from oarlock.merge.deltas import find_deltas
from oarlock.merge.inputs import WeightedAdapter
from oarlock.model_config.load import find_model_class
from oarlock.models.load_finetuned import check_base
from oarlock.peft.adapter_folder import Base
from oarlock.peft.open_adapter import open_lora

# Name of a linear layer -> A [in, r] and scaling * B [r, out], float32.
LoraWeights = dict[str, tuple[np.ndarray, np.ndarray]]


def read_adapters(adapters: Mapping[str, Path], folder: Path, config: PretrainedConfig) -> dict[str, LoraWeights]:
    """The weights of each, by its name.

    Args:
        folder, config: of the base.

    Raises:
        ModelError: when one is no LoRA adapter, or of another base.
    """
    found: dict[str, LoraWeights] = {}
    base = Base.of(str(folder), folder) if adapters else None
    for name, place in adapters.items():
        adapter = open_lora(place, "served beside a base")
        assert base is not None
        check_base(adapter.base, base)
        changes = find_deltas(WeightedAdapter(adapter, 1.0), find_model_class(config), config)
        found[name] = {change.layer: change.matrices() for change in changes}
    return found
