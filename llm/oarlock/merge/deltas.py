"""What LoRA adapters add to the weights of their base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from paddlenlp.transformers import PretrainedConfig

from oarlock.errors import ModelError
from oarlock.merge.inputs import WeightedAdapter
from oarlock.models.layer_offload import make_empty_model
from oarlock.peft.adapter_folder import AdapterFolder
from oarlock.peft.lora import LoRA
from oarlock.peft.method import restore_method, trainable_parameters


@dataclass(frozen=True)
class LoraDelta:
    """An adapter's addition to one weight: factor * A @ B.

    Attributes:
        layer: the weight's name without ".weight".
        factor: the adapter's weight times LoRA's scaling.
        shapes: of A [in, r] and B [r, out].
    """

    adapter: AdapterFolder
    layer: str
    factor: float
    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    def read_matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """Read A and factor * B, float32."""
        a, b = (
            self.adapter.value(f"{self.layer}.{name}", shape).astype(np.float32)
            for name, shape in zip(("lora_A", "lora_B"), self.shapes, strict=True)
        )
        return a, b * np.float32(self.factor)


def restore_lora(adapter: AdapterFolder) -> LoRA:
    """Restore the method of an adapter, for a base that is not quantized."""
    method = restore_method(adapter.method, adapter.settings)
    assert isinstance(method, LoRA)
    return replace(method, quantization=None)


def find_deltas(part: WeightedAdapter, model_class: Any, config: PretrainedConfig) -> Iterator[LoraDelta]:
    """Yield what an adapter adds to each layer.

    Raises:
        ModelError: when its tensors are not those that this method trains on this model.
    """
    adapter = part.adapter.map_to_model(model_class, config)
    method = restore_lora(adapter)
    expected = {
        held.name: held.slice.shape for held in trainable_parameters(make_empty_model(model_class, config, method))
    }
    other = sorted(set(expected) ^ set(adapter.names))
    if other:
        lacks = "lacks" if other[0] in expected else "has"
        raise ModelError(
            f"{adapter.folder}: not an adapter of this model: it {lacks} {other[0]}"
            + (f" and differs in {len(other) - 1} more" if len(other) > 1 else "")
        )
    for name, shape in adapter.shapes().items():
        if shape != expected[name]:
            raise ModelError(f"{adapter.folder}: {name} is {list(shape)}, the model needs {list(expected[name])}")
    for name, shape in expected.items():
        layer, matrix = name.rsplit(".", 1)
        if matrix == "lora_A":
            yield LoraDelta(adapter, layer, part.weight * method.scaling, (shape, expected[f"{layer}.lora_B"]))
