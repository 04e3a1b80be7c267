"""A LoRA adapter as PEFT and vLLM read it, beside its base and not merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from paddlenlp.transformers import PretrainedConfig
from safetensors.numpy import load_file

from oarlock.data.tokenizers.load import has_tokenizer
from oarlock.environment.console import get_logger
from oarlock.errors import ModelError
from oarlock.export.convert_tensors import names_there, parts_of, plain_config
from oarlock.export.manifest import write_manifest
from oarlock.export.tokenizer_files import write_tokenizer
from oarlock.files import read_json_object, require_empty, write_json
from oarlock.hub.model_names import local_folder
from oarlock.merge.deltas import Change, changes_of
from oarlock.merge.inputs import Weighted
from oarlock.merge.verify import TOLERANCES
from oarlock.model_config.hf_config import words_of
from oarlock.model_config.load import read_config
from oarlock.models.build import model_class
from oarlock.peft.adapter_base import find_base
from oarlock.peft.adapter_folder import AdapterFolder
from oarlock.peft.open_adapter import open_lora
from oarlock.weights.safetensors_file import TensorSource, write_safetensors
from oarlock.weights.save import whole_folder

logger = get_logger(__name__)

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_INPUTS = 4  # random ones, by which changes of a layer are compared


@dataclass(frozen=True)
class PeftAdapter:
    """What was written.

    Attributes:
        base: what adapter_config.json names.
        names: of the tensors.
        targets: last parts of the names of the layers there.
        sha256: of the weight file.
        difference: the largest between what PEFT adds by these files and what the adapter adds in training, relative to
            the largest of a layer.
    """

    base: str
    names: tuple[str, ...]
    targets: tuple[str, ...]
    sha256: str
    difference: float


def export_peft(adapter: Path, output: Path, base: str | None = None) -> PeftAdapter:
    """Write adapter_config.json and adapter_model.safetensors.

    An adapter of a fused layer becomes one of each of its parts, with the same A: what it adds is the same. That is
    shown before the folder has its name: by PEFT's rule, the files that were read back change some inputs of every
    layer as the adapter does.

    Args:
        adapter: folder that a LoRA run wrote.
        base: folder or hub name of the base model, if not where it was in training; it is what the result names.

    Raises:
        ModelError: for an adapter of another kind, one that does not fit the base, a family transformers has not, or
            when the proof fails.
    """
    adapter, output = Path(adapter), Path(output).resolve()
    require_empty(output)
    found = open_lora(adapter, "written for PEFT")
    name = base or found.base.name
    folder = local_folder(base, False) if base else find_base(found, "Name it: --base BASE", with_weights=False)
    config = read_config(folder)
    words_of(config.model_type)
    tensors = list(_tensors(found, config))
    targets = tuple(sorted({tensor.name.split(".")[-3] for tensor in tensors}))
    with whole_folder(output, "the adapter", [adapter]) as partial_folder:
        record = write_safetensors(partial_folder / _WEIGHTS, tensors, {"format": "pt"})
        write_json(partial_folder / _CONFIG, _config(found.settings, name, targets))
        if has_tokenizer(adapter):
            write_tokenizer(adapter, "hf", config.model_type, partial_folder)
        about = {"adapter": str(adapter), "base": found.base.name, "fingerprint": found.base.fingerprint}
        difference = _prove(found, config, partial_folder)
        proof = {"difference": difference, "allowed": TOLERANCES["float32"], "tensors": len(tensors)}
        facts: dict[str, Any] = {"target": "peft", "family": config.model_type, "proof": proof}
        write_manifest(partial_folder, known={_WEIGHTS: record.sha256}, source=about, **facts)
    if found.settings.get("quantization"):
        logger.info(
            f"{adapter} was trained on a quantised base: beside the plain one it corrects roundings that are not there"
        )
    logger.info(
        f"{adapter} -> {output}: {len(tensors)} tensors for PEFT, {record.num_bytes / 1e6:,.1f} MB, base {name}"
    )
    return PeftAdapter(name, tuple(tensor.name for tensor in tensors), targets, record.sha256, difference)


def _prove(adapter: AdapterFolder, config: PretrainedConfig, folder: Path) -> float:
    """See PeftAdapter.difference; by peft.tuners.lora.layer.Linear.

    Raises:
        ModelError: when it is more than rounding.
    """
    stored, settings = load_file(folder / _WEIGHTS), read_json_object(folder / _CONFIG)
    scaling = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings["use_rslora"] else settings["r"])
    there, random, worst = names_there(plain_config(config)), np.random.default_rng(0), 0.0
    for change in changes_of(Weighted(adapter, 1.0), model_class(config), config):
        a, b = change.matrices()
        inputs = random.standard_normal((_INPUTS, a.shape[0]), np.float32)
        for part in parts_of(f"{change.layer}.weight", change.shapes[1], config):
            layer = _PREFIX + there[part.name][0].removesuffix(".weight")
            wanted = inputs @ a @ (part.part(b) if part.part else b)
            found = scaling * (inputs @ stored[f"{layer}.lora_A.weight"].T @ stored[f"{layer}.lora_B.weight"].T)
            difference = float(np.abs(found - wanted).max()) / (float(np.abs(wanted).max()) or 1.0)
            worst = max(worst, difference)
            if not difference <= TOLERANCES["float32"]:  # NaN too
                raise ModelError(
                    f"proof: {part.name} would be changed by other values than in training ({difference:.1e} of the "
                    "largest); nothing was written"
                )
    logger.info(f"proof: what PEFT adds to every layer and what the adapter adds differ by {worst:.1e} of the largest")
    return worst


def _tensors(adapter: AdapterFolder, config: PretrainedConfig) -> Iterator[TensorSource]:
    there = names_there(plain_config(config))
    for change in changes_of(Weighted(adapter, 1.0), model_class(config), config):
        for part in parts_of(f"{change.layer}.weight", change.shapes[1], config):
            if part.name not in there:
                raise ModelError(f"{adapter.folder}: {part.name} has no name in Hugging Face's format")
            layer = _PREFIX + there[part.name][0].removesuffix(".weight")
            rank, outputs = part.shape
            yield _tensor(f"{layer}.lora_A.weight", (rank, change.shapes[0][0]), partial(_a, change))
            yield _tensor(f"{layer}.lora_B.weight", (outputs, rank), partial(_b, change, part.part))


def _tensor(name: str, shape: tuple[int, ...], read: Any) -> TensorSource:
    return TensorSource(name, "float32", shape, read, cast=True)


def _a(change: Change) -> np.ndarray:
    return change.adapter.value(f"{change.layer}.lora_A", change.shapes[0]).T


def _b(change: Change, cut: Any) -> np.ndarray:
    values = change.adapter.value(f"{change.layer}.lora_B", change.shapes[1])
    return (cut(values) if cut else values).T


def _config(settings: dict[str, Any], base: str, targets: tuple[str, ...]) -> dict[str, Any]:
    alpha = settings["alpha"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings["r"],
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": settings["dropout"],
        "use_rslora": settings["rslora"],
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
