"""Compare stored weights with those that a config.json implies, by Hugging Face's names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oarlock.environment.paddle_import import on_cpu
from oarlock.export.convert_tensors import list_parameter_shapes, unfuse_config
from oarlock.families.model_sizes import ModelSizes
from oarlock.model_config.load import find_model_class, make_config
from oarlock.model_config.size_check import count_least_parameters
from oarlock.models.memory_check import check_tables
from oarlock.weights.hf_names import list_hf_names
from oarlock.weights.sources import check_stored

# Checked elsewhere (a server may support more), or without influence on names and shapes.
_NO_WEIGHTS = (
    "rope_scaling",
    "rope_parameters",
    "torch_dtype",
    "dtype",
)


@dataclass(frozen=True)
class Differences:
    """Differences between the weights of a folder and those of its architecture, as sorted names.

    Attributes:
        missing: names that the architecture has and the folder has not.
        left_over: names that only the folder has.
        shapes: names with both shapes, where they differ.
    """

    missing: list[str]
    left_over: list[str]
    shapes: list[str]


def compare_names(config: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]) -> Differences:
    """Compare the weights that config.json implies with the stored ones.

    Args:
        config: content of config.json.
        stored: name -> shape.

    Raises:
        ModelError: when config.json describes no model, or the family has no names in Hugging Face's format.
    """
    ours = unfuse_config(make_config({k: v for k, v in config.items() if k not in _NO_WEIGHTS}, "config.json"))
    with on_cpu():
        check_tables(ours, "config.json")
        elements = sum(math.prod(shape) for shape in stored.values())
        if ModelSizes.from_config(ours).num_layers > len(stored) or count_least_parameters(ours) > 4 * elements:
            check_stored(ours, stored, "config.json")  # raises: the whole model differs
        own = list_parameter_shapes(ours)
    missing, shapes, used = [], [], set()
    for names, mapping in list_hf_names(find_model_class(ours), ours):
        if mapping.target_name not in own:
            continue
        name = next((name for name in names if name in stored), None)
        if name is None:
            missing.append(names[0])
            continue
        used.add(name)
        shape = own[mapping.target_name]
        shape = shape[::-1] if mapping.action == "transpose" else shape
        if stored[name] != shape:
            shapes.append(f"{name} ({list(stored[name])}, not {list(shape)})")
    return Differences(sorted(set(missing)), sorted(set(stored) - used), sorted(shapes))
