"""Open an adapter folder of Oarlock or of PEFT."""

from __future__ import annotations

from pathlib import Path

from oarlock.errors import ModelError, OarlockError
from oarlock.files import ADAPTER_FILE, PEFT_FILE
from oarlock.formats.json_file import check_content, read_json
from oarlock.formats.links import check_links
from oarlock.peft.adapter_folder import FORMAT, WEIGHTS_FILE, AdapterFolder, Base
from oarlock.peft.adapter_schema import SETTINGS, AdapterFields, QuantizationFields
from oarlock.peft.hf_peft_folder import open_peft
from oarlock.weights.safetensors_file import SafetensorsFile
from oarlock.weights.shard_index import INDEX


def open_adapter(folder: str | Path) -> AdapterFolder:
    """Open an adapter folder, including PEFT's.

    Raises:
        ModelError: when it is not one, or damaged.
    """
    folder = Path(folder)
    check_links(folder)
    path = folder / ADAPTER_FILE
    if (folder / PEFT_FILE).is_file() and not path.is_file():
        return open_peft(folder)
    missing = next((name for name in (ADAPTER_FILE, WEIGHTS_FILE) if not (folder / name).exists()), None)
    if missing is not None:
        how = f". It is a checkpoint: `oarlock checkpoint consolidate {folder} ADAPTER` makes an adapter folder of it"
        if not (path.exists() and (folder / INDEX).exists()):  # a checkpoint of a full model has no adapter
            how = ""
        raise ModelError(f"{folder}: not an adapter folder: {missing} is missing{how}")
    content = read_adapter_file(path)
    settings, weights = content["settings"], folder / WEIGHTS_FILE
    rank = settings.get("r")
    with SafetensorsFile(weights) as file:
        for name, about in file.tensors.items():
            if about.dtype.kind in "iub":
                kind = about.dtype.name
                raise ModelError(f"{weights}: {name} is stored in {kind}, which is not a type of adapter weights")
            axis = 1 if name.endswith(".lora_A") else 0
            if rank is not None and (len(about.shape) != 2 or about.shape[axis] != rank):
                raise ModelError(f"{weights}: {name} is {list(about.shape)}, and {ADAPTER_FILE} says a rank of {rank}")
        names = tuple(file.tensors)
    return AdapterFolder(folder, content["method"], settings, Base(**content["base"]), names)


def read_adapter_file(path: Path, error: type[OarlockError] = ModelError) -> AdapterFields:
    """Read adapter.json and check its settings against their method.

    Raises:
        OarlockError: of the given class.
    """
    content = read_json(path, AdapterFields, error=error)
    if content["format"] != FORMAT:
        raise error(f"{path}: format {content['format']}, this version reads {FORMAT}")
    schema, name = SETTINGS[content["method"]], f"{path}: settings"
    content["settings"] = dict(check_content(content["settings"], name, schema, error=error, extra="allow"))
    if (how := content["settings"].get("quantization")) is not None:
        check_content(how, f"{name}.quantization", QuantizationFields, error=error, extra="forbid")
    return content


def open_lora(folder: str | Path, what: str) -> AdapterFolder:
    """Open a LoRA adapter.

    Args:
        what: will be done with it, for the message.

    Raises:
        ModelError: when it is not one, damaged, or trained with another method.
    """
    found = open_adapter(folder)
    if found.method != "lora":
        raise ModelError(
            f"{folder} was trained with {found.method}: only LoRA adapters can be {what} (`oarlock ask` answers "
            "with this one)"
        )
    return found
