"""The LoRA adapters of a merge: which ones, with what weights, and whether they belong together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oarlock.errors import ConfigError, ModelError
from oarlock.peft.adapter_folder import UNKNOWN_BASE, AdapterFolder, Base
from oarlock.peft.open_adapter import open_lora


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter and the factor of its addition to the base."""

    adapter: AdapterFolder
    weight: float


@dataclass(frozen=True)
class AdapterMix:
    """The base plus the sum of weight * delta over the adapters.

    Attributes:
        base: that all of them were trained on.
        quantization: of the weights under LoRA in training (settings of oarlock.peft.quantization), or None.
    """

    parts: tuple[WeightedAdapter, ...]
    base: Base
    quantization: dict[str, Any] | None

    @classmethod
    def open(cls, folders: Sequence[str | Path], weights: Sequence[float] = ()) -> AdapterMix:
        """Open the adapters.

        Args:
            weights: one for each folder; none for 1 each.

        Raises:
            ConfigError: when there are not as many weights as adapters, or one is not finite.
            ModelError: for a folder without a LoRA adapter, or one of another base than the first.
        """
        if weights and len(weights) != len(folders):
            raise ConfigError(
                f"{len(folders)} adapter(s) and {len(weights)} weight(s): give --weight once for each --adapter, in "
                "the same order, or not at all"
            )
        if not all(math.isfinite(weight) for weight in weights):
            raise ConfigError(f"--weight {' '.join(map(str, weights))}: must be finite numbers")
        parts = tuple(
            WeightedAdapter(open_lora(folder, "added to the weights of their base"), weight)
            for folder, weight in zip(folders, weights or [1.0] * len(folders), strict=True)
        )
        first = parts[0].adapter
        for part in parts:
            adapter = part.adapter
            prints = {adapter.base.fingerprint, first.base.fingerprint}
            if len(prints) > 1 and UNKNOWN_BASE not in prints:
                raise ModelError(
                    f"{adapter.folder} and {first.folder} have different bases ({adapter.base.name} and "
                    f"{first.base.name}): only adapters of one base can be merged together"
                )
            how = adapter.settings.get("quantization")
            if how != first.settings.get("quantization") or (how and _list_layers(adapter) != _list_layers(first)):
                raise ModelError(
                    f"{adapter.folder} and {first.folder} were trained on differently quantized weights of "
                    f"{first.base.name}: merge them one by one"
                )
        known = next((part.adapter.base for part in parts if part.adapter.base.fingerprint != UNKNOWN_BASE), first.base)
        return cls(parts, known, first.settings.get("quantization"))

    def map_to_model(self, model_class: Any, config: Any) -> AdapterMix:
        """Map every adapter to our names of the base's layers."""
        parts = tuple(replace(part, adapter=part.adapter.map_to_model(model_class, config)) for part in self.parts)
        return replace(self, parts=parts)

    @property
    def layers(self) -> set[str]:
        """Names of the layers with LoRA."""
        return {layer for part in self.parts for layer in _list_layers(part.adapter)}


def _list_layers(adapter: AdapterFolder) -> set[str]:
    return {name.rsplit(".", 1)[0] for name in adapter.names}
