"""Which weights Hugging Face's files of a model have: PaddleNLP's empty model, under its names there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oarlock.environment.paddle_import import on_cpu
from oarlock.export.convert_tensors import plain_config, shapes_of
from oarlock.families.model_sizes import ModelSizes
from oarlock.model_config.load import find_model_class, make_config
from oarlock.model_config.size_check import count_least_parameters
from oarlock.models.memory_check import check_tables
from oarlock.weights.hf_names import hugging_face_names
from oarlock.weights.sources import check_stored

# Checked on their own (a server may know more), or without a say in names and shapes.
_NO_WEIGHTS = (
    "rope_scaling",
    "rope_parameters",
    "torch_dtype",
    "dtype",
)


@dataclass(frozen=True)
class Differences:
    """Between the weights of a directory and those of its architecture; names, sorted.

    Attributes:
        shapes: names with both shapes.
    """

    missing: list[str]
    left_over: list[str]
    shapes: list[str]


def compare_names(config: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]) -> Differences:
    """Compare what config.json implies with what is stored.

    Args:
        config: its content.
        stored: name -> shape.

    Raises:
        ModelError: when config.json makes no model, or the family has no names in Hugging Face's format.
    """
    ours = plain_config(make_config({k: v for k, v in config.items() if k not in _NO_WEIGHTS}, "config.json"))
    with on_cpu():
        check_tables(ours, "config.json")
        elements = sum(math.prod(shape) for shape in stored.values())
        if ModelSizes.from_config(ours).num_layers > len(stored) or count_least_parameters(ours) > 4 * elements:
            check_stored(ours, stored, "config.json")  # it is not about single tensors then
        own = shapes_of(ours)
    missing, shapes, used = [], [], set()
    for names, mapping in hugging_face_names(find_model_class(ours), ours):
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
