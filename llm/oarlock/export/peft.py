"""A LoRA adapter as PEFT and vLLM read it, beside its base and not merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from paddlenlp.transformers import PretrainedConfig

from oarlock.environment import say
from oarlock.errors import ModelError
from oarlock.export.companions import has_tokenizer, write_tokenizer
from oarlock.export.manifest import write_manifest
from oarlock.export.tensors import names_there, parts_of, plain_config
from oarlock.files import is_vacant, write_json
from oarlock.models.adapter import AdapterFolder, open_adapter
from oarlock.models.adapter_mix import Weighted
from oarlock.models.build import model_class
from oarlock.models.configs import read_config
from oarlock.models.hf_config import words_of
from oarlock.models.hub import local_folder
from oarlock.models.lora_changes import Change, changes_of
from oarlock.models.safetensors_stream import TensorSource, write_safetensors
from oarlock.models.save import whole_folder

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftAdapter:
    """What was written.

    Attributes:
        base: what adapter_config.json names.
        names: of the tensors.
        targets: last parts of the names of the layers there.
        sha256: of the weight file.
    """

    base: str
    names: tuple[str, ...]
    targets: tuple[str, ...]
    sha256: str


def export_peft(adapter: Path, output: Path, base: str | None = None) -> PeftAdapter:
    """Write adapter_config.json and adapter_model.safetensors.

    An adapter of a fused layer becomes one of each of its parts, with the same A: what it adds is the same.

    Args:
        adapter: folder that a LoRA run wrote.
        base: folder or hub name of the base model, if not where it was in training; it is what the result names.

    Raises:
        ModelError: for an adapter of another kind, one that does not fit the base, or a family transformers has not.
    """
    adapter, output = Path(adapter), Path(output).resolve()
    if not is_vacant(output):
        raise ModelError(f"{output}: there is something already; give a folder that does not exist yet")
    found = open_adapter(adapter)
    if found.method != "lora":
        raise ModelError(f"{adapter}: PEFT's LoRA has no place for what {found.method} trains")
    name = base or found.base.name
    folder = local_folder(name, with_weights=False)
    config = read_config(folder)
    words_of(config.model_type)
    tensors = list(_tensors(found, config))
    targets = tuple(sorted({tensor.name.split(".")[-3] for tensor in tensors}))
    with whole_folder(output, "the adapter") as partial_folder:
        record = write_safetensors(partial_folder / _WEIGHTS, tensors, {"format": "pt"})
        write_json(partial_folder / _CONFIG, _config(found.settings, name, targets))
        if has_tokenizer(adapter):
            write_tokenizer(adapter, "hf", config.model_type, partial_folder)
        about = {"adapter": str(adapter), "base": found.base.name, "fingerprint": found.base.fingerprint}
        facts: dict[str, Any] = {"target": "peft", "family": config.model_type, "proof": None}
        write_manifest(partial_folder, known={_WEIGHTS: record.sha256}, source=about, **facts)
    if found.settings.get("quantization"):
        say(f"{adapter} was trained on a quantised base: beside the plain one it corrects roundings that are not there")
    say(f"{adapter} -> {output}: {len(tensors)} tensors for PEFT, {record.num_bytes / 1e6:,.1f} MB, base {name}")
    return PeftAdapter(name, tuple(tensor.name for tensor in tensors), targets, record.sha256)


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
