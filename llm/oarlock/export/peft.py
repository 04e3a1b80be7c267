"""Export a LoRA adapter for PEFT and vLLM, without merging it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from paddlenlp.transformers import PretrainedConfig
from safetensors.numpy import load_file

from oarlock.data.tokenizers.load import has_tokenizer
from oarlock.environment.console import get_logger
from oarlock.errors import ModelError
from oarlock.export.convert_tensors import UnfusedParameter, map_hf_names, split_fused_parameter, unfuse_config
from oarlock.export.manifest import write_manifest
from oarlock.export.tokenizer_files import write_tokenizer
from oarlock.families.registry import find_hf_config
from oarlock.files import read_json_object, require_empty, write_json
from oarlock.merge.deltas import LoraDelta, find_deltas
from oarlock.merge.inputs import WeightedAdapter
from oarlock.model_config.load import find_model_class, read_config
from oarlock.model_config.model_folder import find_model_folder
from oarlock.models.proof import TOLERANCES, Proof
from oarlock.peft.adapter_base import find_base
from oarlock.peft.adapter_folder import AdapterFolder
from oarlock.peft.open_adapter import open_lora
from oarlock.weights.safetensors_file import TensorSource, write_safetensors
from oarlock.weights.save import create_model_folder

logger = get_logger(__name__)

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_INPUTS = 4  # random inputs by which the changes of a layer are compared


@dataclass(frozen=True)
class PeftProof(Proof):
    """A comparison of what PEFT's rule and the adapter add to random inputs of every layer.

    The difference is the largest of any layer, relative to the largest change in that layer.

    Attributes:
        tensors: number of tensors.
    """

    tensors: int


@dataclass(frozen=True)
class PeftAdapter:
    """A written PEFT adapter.

    Attributes:
        base: name of the base in adapter_config.json.
        names: names of the tensors.
        targets: last parts of the names of the changed layers.
        sha256: of the weight file.
        proof: comparison of the changes by PEFT with those by the adapter in training.
    """

    base: str
    names: tuple[str, ...]
    targets: tuple[str, ...]
    sha256: str
    proof: PeftProof


def export_peft(adapter: Path, output: Path, base: str | None = None) -> PeftAdapter:
    """Write adapter_config.json and adapter_model.safetensors.

    An adapter of a fused layer becomes an adapter of each of its parts, with the same A and a slice of B. As a proof,
    the files are read back, and PEFT's rule applied to random inputs of every layer.

    Args:
        adapter: folder of a LoRA run.
        output: folder to write. It must not exist yet.
        base: folder or hub name of the base model, if it has moved since training. The result names it.

    Raises:
        ModelError: when the adapter is of another kind or does not fit the base, transformers does not have the family,
            or the proof fails.
    """
    adapter, output = Path(adapter), Path(output).resolve()
    require_empty(output)
    found = open_lora(adapter, "written for PEFT")
    name = base or found.base.name
    folder = find_model_folder(base, False) if base else find_base(found, "Name it: --base BASE", with_weights=False)
    config = read_config(folder)
    find_hf_config(config.model_type)
    tensors = list(_list_tensors(found, config))
    check_expert_names([tensor.name for tensor in tensors], found.folder)
    targets = tuple(sorted({tensor.name.split(".")[-3] for tensor in tensors}))
    with create_model_folder(output, "the adapter", [adapter]) as partial_folder:
        record = write_safetensors(partial_folder / _WEIGHTS, tensors, {"format": "pt"})
        write_json(partial_folder / _CONFIG, _make_config(found.settings, name, targets))
        if has_tokenizer(adapter):
            write_tokenizer(adapter, "hf", config.model_type, partial_folder)
        about = {"adapter": str(adapter), "base": found.base.name, "fingerprint": found.base.fingerprint}
        proof = _prove(found, config, partial_folder, len(tensors))
        facts: dict[str, Any] = {"target": "peft", "family": config.model_type, "proof": asdict(proof)}
        write_manifest(partial_folder, known={_WEIGHTS: record.sha256}, source=about, **facts)
    if found.settings.get("quantization"):
        logger.info(
            f"{adapter} was trained on a quantised base: it also corrects rounding that the plain base does not have"
        )
    logger.info(
        f"{adapter} -> {output}: {len(tensors)} tensors for PEFT, {record.num_bytes / 1e6:,.1f} MB, base {name}"
    )
    return PeftAdapter(name, tuple(tensor.name for tensor in tensors), targets, record.sha256, proof)


def check_expert_names(names: Sequence[str], folder: Path) -> None:
    """Refuse LoRA on experts and on dense layers of the same names (DeepSeek's first layers and shared experts).

    transformers 5 has one parameter for all experts of a layer. PEFT (0.21) reads LoRA of experts as that of this
    parameter, and then drops the other layers of these names with a warning.

    Raises:
        ModelError: naming such a layer.
    """
    experts = {name.split(".")[-3] for name in names if ".experts." in name}
    dense = next((name for name in names if ".experts." not in name and name.split(".")[-3] in experts), None)
    if dense is not None:
        layer = dense.removeprefix("base_model.model.").rpartition(".lora_")[0]
        raise ModelError(
            f"{folder}: the adapter changes experts, and {layer}, which has the name of a layer of the experts: PEFT "
            "would leave it out. Export the merged model (--target hf), or train without these layers "
            "(--lora_target_modules)"
        )


def _prove(adapter: AdapterFolder, config: PretrainedConfig, folder: Path, num_tensors: int) -> PeftProof:
    """Compare what PEFT's rule (peft.tuners.lora.layer.Linear) makes of the files with the adapter itself.

    Raises:
        ModelError: when it is more than rounding explains.
    """
    stored, settings = load_file(folder / _WEIGHTS), read_json_object(folder / _CONFIG)
    scaling = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings["use_rslora"] else settings["r"])
    random, worst = np.random.default_rng(0), 0.0
    for layer, change, part in _list_layers(adapter, config):
        a, b = change.read_matrices()
        inputs = random.standard_normal((_INPUTS, a.shape[0]), np.float32)
        wanted = inputs @ a @ (part.cut(b) if part.cut else b)
        found = scaling * (inputs @ stored[f"{layer}.lora_A.weight"].T @ stored[f"{layer}.lora_B.weight"].T)
        difference = float(np.abs(found - wanted).max()) / (float(np.abs(wanted).max()) or 1.0)
        worst = max(worst, difference)
        if not difference <= TOLERANCES["float32"]:  # NaN too
            raise ModelError(
                f"proof: PEFT would change {part.name} by other values than the adapter ({difference:.1e} of the "
                "largest); nothing was written"
            )
    logger.info(f"proof: the changes by PEFT and by the adapter differ by {worst:.1e} of the largest in a layer")
    return PeftProof(worst, TOLERANCES["float32"], num_tensors)


def _list_layers(adapter: AdapterFolder, config: PretrainedConfig) -> Iterator[tuple[str, LoraDelta, UnfusedParameter]]:
    """Yield the name of each layer in PEFT, the change that holds it, and its part of that."""
    names = map_hf_names(unfuse_config(config))
    for change in find_deltas(WeightedAdapter(adapter, 1.0), find_model_class(config), config):
        for part in split_fused_parameter(f"{change.layer}.weight", change.shapes[1], config):
            if part.name not in names:
                raise ModelError(f"{adapter.folder}: {part.name} has no name in Hugging Face's format")
            yield _PREFIX + names[part.name][0].removesuffix(".weight"), change, part


def _list_tensors(adapter: AdapterFolder, config: PretrainedConfig) -> Iterator[TensorSource]:
    for layer, change, part in _list_layers(adapter, config):
        rank, outputs = part.shape
        for name, shape, cut in (
            ("lora_A", (rank, change.shapes[0][0]), None),
            ("lora_B", (outputs, rank), part.cut),
        ):
            read = partial(_read_transposed, change, name, cut)
            yield TensorSource(f"{layer}.{name}.weight", "float32", shape, read, cast=True)


def _read_transposed(change: LoraDelta, name: str, cut: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
    """Read A or B, which PEFT stores as [out, in]."""
    values = change.adapter.value(f"{change.layer}.{name}", change.shapes[name == "lora_B"])
    return (cut(values) if cut else values).T


def _make_config(settings: dict[str, Any], base: str, targets: tuple[str, ...]) -> dict[str, Any]:
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
