"""A LoRA adapter as PEFT saves it (adapter_config.json, adapter_model.safetensors), read as it is.

PEFT uses the names of transformers' model and transposed matrices, so the base's configuration is needed first:
`map_to_model`. An adapter that does more than A and B is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from oarlock.errors import ModelError
from oarlock.families.registry import FAMILIES
from oarlock.files import PEFT_FILE, PEFT_WEIGHTS
from oarlock.formats.json_file import read_json
from oarlock.peft.adapter_folder import UNKNOWN_BASE, AdapterFolder, Base
from oarlock.peft.adapter_schema import PeftFields
from oarlock.peft.hf_peft_tensors import check_tensors, find_by_pattern
from oarlock.weights.buffers import all_finite
from oarlock.weights.safetensors_file import SafetensorsFile

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<layer>.+)\.lora_(?P<which>[AB])(\.default)?\.weight")
_PLAIN_NAME = re.compile(r"\^?[\w.]+")
# Fields that do not affect the result: records, training defaults, which layers (the tensors tell).
_RECORDS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version",
        "megatron_config", "megatron_core", "runtime_config", "qalora_group_size", "target_modules", "exclude_modules",
        "layers_to_transform", "layers_pattern", "eva_config", "rank_pattern", "ensure_weight_tying",
    }
)  # fmt: skip
_SUPPORTED = frozenset({"r", "lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern"})
# Initializations that do not change the base's weights (PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do).
_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal", "kaiming")
_ONLY: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": _INITIALIZATIONS,
    "task_type": ("CAUSAL_LM",),
}


@dataclass(frozen=True)
class PeftFolder(AdapterFolder):
    """PEFT's adapter. Before map_to_model(), its settings lack the layers and its names are PEFT's.

    Attributes:
        alphas: pattern of layer names -> lora_alpha.
        places: name in our model -> (stored tensor, factor). The tensor is "" for a layer without LoRA, whose
            matrices are zeros.
    """

    alphas: Mapping[str, float] = field(default_factory=dict)
    places: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    def map_to_model(self, model_class: Any, config: Any) -> PeftFolder:
        """Map the adapter to our names for a base of this configuration.

        Different ranks and scalings of layers become one: the largest rank, padded with zeros, and the scaling as part
        of B.

        Raises:
            ModelError: naming the layers that the base lacks, or that are not linear.
        """
        from oarlock.weights.hf_names import list_hf_names

        if self.places:
            return self
        own = FAMILIES[config.model_type].lora_targets
        transposed = {
            name.removesuffix(".weight"): mapping.target_name.removesuffix(".weight")
            for names, mapping in list_hf_names(model_class, config)
            if mapping.action == "transpose" and mapping.target_name.split(".")[-2] in own
            for name in names
        }
        shapes = self.stored_shapes()
        rank = max(shape[0 if name.endswith("A.weight") else 1] for name, shape in shapes.items())
        settings = {**self.settings, "r": rank}
        settings["scaling"] = _compute_scaling(settings["alpha"], rank, settings["rslora"])
        places: dict[str, tuple[str, float]] = {}
        targets = set()
        for stored, shape in shapes.items():
            layer, which = _parse_name(stored, self.folder)
            here = transposed.get(layer)
            if here is None:
                raise ModelError(
                    f"{self.folder / PEFT_WEIGHTS}: this {config.model_type} has no layer {layer} for LoRA "
                    f"(its base is {self.base.name or 'not named'})"
                )
            factor = 1.0
            if which == "B":
                alpha = find_by_pattern(self.alphas, layer, float(settings["alpha"]))
                factor = _compute_scaling(alpha, shape[1], settings["rslora"]) / settings["scaling"]
            places[f"{here}.lora_{which}"] = (stored, factor)
            targets.add(here.rpartition(".")[2])
        settings["targets"] = sorted(targets)
        for here in transposed.values():
            if here.rpartition(".")[2] in targets:
                places = {f"{here}.lora_A": ("", 1.0), f"{here}.lora_B": ("", 1.0)} | places
        return replace(self, settings=settings, names=tuple(places), places=places)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        stored, rank = self.stored_shapes(), self.settings["r"]
        found: dict[str, tuple[int, ...]] = {}
        for name, (place, _) in self.places.items():
            if not place:
                continue
            outputs, inputs = stored[place]
            found[name] = (inputs, rank) if name.endswith("lora_A") else (rank, outputs)
        return found

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the file -> shape there."""
        try:
            with SafetensorsFile(self.folder / PEFT_WEIGHTS) as file:
                return {name: tensor.shape for name, tensor in file.tensors.items()}
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.folder / PEFT_WEIGHTS}: can't be read: {error}") from error

    def value(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.places:
            raise ModelError(f"{self.folder}: the adapter has no {name}: it was trained on another model or layers")
        stored, factor = self.places[name]
        if not stored:
            return np.zeros(shape, np.float32)
        try:
            with SafetensorsFile(self.folder / PEFT_WEIGHTS) as file:
                about = file.tensors[stored]
                values = np.empty(about.shape, about.dtype)
                file.read(stored, 0, values)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.folder / PEFT_WEIGHTS}: {stored} can't be read: {error}") from error
        if not all_finite(values):
            raise ModelError(f"{self.folder / PEFT_WEIGHTS}: {stored} holds values that are not finite numbers")
        found = values.T
        axis = 1 if name.endswith("lora_A") else 0
        missing = shape[axis] - found.shape[axis]
        if found.shape[1 - axis] != shape[1 - axis] or missing < 0:
            raise ModelError(f"{self.folder}: {stored} is {list(about.shape)}, the model needs {list(shape[::-1])}")
        if missing:
            padding = [(0, missing if i == axis else 0) for i in range(2)]
            found = np.pad(found, padding)
        return np.ascontiguousarray(found if factor == 1.0 else found.astype(np.float32) * np.float32(factor))


def _compute_scaling(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def is_peft_folder(adapter: AdapterFolder) -> bool:
    """Check whether PEFT saved an adapter."""
    return isinstance(adapter, PeftFolder)


def open_peft(folder: Path) -> PeftFolder:
    """Open PEFT's adapter.

    Raises:
        ModelError: when it is damaged, not a LoRA adapter, or does more than A and B.
    """
    path = folder / PEFT_FILE
    found_fields = read_json(path, PeftFields, extra="allow")
    content: dict[str, Any] = {name: value for name, value in found_fields.items() if value is not None}
    if content.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type is {content.get('peft_type')!r}; the only supported type is LORA")
    _check_fields(content, path)
    if not (folder / PEFT_WEIGHTS).is_file():
        pickle = " (adapter_model.bin is a pickle: save it again with safe_serialization)"
        raise ModelError(f"{folder}: no {PEFT_WEIGHTS}{pickle if (folder / 'adapter_model.bin').is_file() else ''}")
    alphas: dict[str, Any] = content.get("alpha_pattern", {})
    for name in ("alpha_pattern", "rank_pattern"):
        odd = next((pattern for pattern in content.get(name, {}) if not _PLAIN_NAME.fullmatch(pattern)), None)
        if odd is not None:
            raise ModelError(f"{path}: {name} {odd!r}: only layer names are supported, not regular expressions")
    rank, alpha = content.get("r", 8), content.get("lora_alpha", 8)
    rslora = content.get("use_rslora", False)
    settings = {
        "r": rank,
        "alpha": float(alpha),
        "dropout": float(content.get("lora_dropout", 0.0)),
        "targets": [],
        "rslora": rslora,
        "plus_scale": 1.0,
        "quantization": None,
        "scaling": _compute_scaling(alpha, rank, rslora),
    }
    base = Base(content.get("base_model_name_or_path", ""), UNKNOWN_BASE)
    found = PeftFolder(folder, "lora", settings, base, (), alphas)
    names = tuple(found.stored_shapes())
    if not names:
        raise ModelError(f"{folder / PEFT_WEIGHTS}: the file has no tensors")
    check_tensors(folder / PEFT_WEIGHTS, content, {name: _parse_name(name, folder) for name in names})
    return replace(found, names=names)


def _parse_name(stored: str, folder: Path) -> tuple[str, str]:
    """Split the name of a stored tensor into its layer and "A" or "B"."""
    match = _TENSOR.fullmatch(stored.removeprefix(_PREFIX))
    if match is None:
        raise ModelError(
            f"{folder / PEFT_WEIGHTS}: {stored} is neither A nor B of a LoRA layer; nothing else is supported "
            "(DoRA, biases, modules_to_save, embeddings)"
        )
    return match["layer"], match["which"]


def _check_fields(content: Mapping[str, Any], path: Path) -> None:
    for name, value in content.items():
        if name in _RECORDS or name in _SUPPORTED or (name in _ONLY and value in _ONLY[name]):
            continue
        if value in (False, None, 0) or value in ({}, [], ""):
            continue
        text = repr(value)
        raise ModelError(f"{path}: {name} is {text if len(text) < 60 else text[:57] + '...'}, which is not supported")
