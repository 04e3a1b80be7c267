"""Open an adapter folder, one of Oarlock's or one that PEFT saved."""

from __future__ import annotations

import json
from pathlib import Path

from oarlock.errors import ModelError
from oarlock.files import ADAPTER_FILE, PEFT_FILE
from oarlock.formats.links import check_links
from oarlock.models.adapter import FORMAT, WEIGHTS_FILE, AdapterFolder, Base
from oarlock.models.peft_folder import open_peft
from oarlock.models.pieces import INDEX
from oarlock.models.safetensors_stream import SafetensorsFile


def open_adapter(folder: str | Path) -> AdapterFolder:
    """Read what an adapter folder is, one of PEFT's too.

    Raises:
        ModelError: when it is none, or damaged.
    """
    folder = Path(folder)
    check_links(folder)
    path = folder / ADAPTER_FILE
    if (folder / PEFT_FILE).is_file() and not path.is_file():
        return open_peft(folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ModelError(f"{path}: format {content['format']}, this version reads {FORMAT}")
        with SafetensorsFile(folder / WEIGHTS_FILE) as file:
            names = tuple(file.tensors)
        return AdapterFolder(folder, content["method"], content["settings"], Base(**content["base"]), names)
    except FileNotFoundError as error:
        missing = Path(error.filename or path).name
        how = f". It is a checkpoint: `oarlock checkpoint consolidate {folder} ADAPTER` makes an adapter folder of it"
        if not (path.exists() and (folder / INDEX).exists()):  # a checkpoint of a whole model has no adapter
            how = ""
        raise ModelError(f"{folder}: not an adapter folder: {missing} is missing{how}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a readable adapter: {error!r}") from error


def open_lora(folder: str | Path, what: str) -> AdapterFolder:
    """A LoRA adapter.

    Args:
        what: is to be done with it, for the message.

    Raises:
        ModelError: when it is none, damaged, or trained with another method.
    """
    found = open_adapter(folder)
    if found.method != "lora":
        raise ModelError(
            f"{folder} was trained with {found.method}: only LoRA adapters can be {what} (`oarlock ask` answers "
            "with this one)"
        )
    return found
