"""Folders of tiny models that tests change and read again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from families import FAMILIES, family_model
from oarlock.model_config.load import read_config
from oarlock.models.build import ModelSource, build_model
from oarlock.weights.save import save_config


class Folders:
    """A tiny model of each family, in Paddle's layout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content: dict[str, dict[str, Any]] = {}
        for family in FAMILIES:
            model, folder = family_model(family), root / family
            folder.mkdir()
            save_config(model.config, folder)
            tensors = {name: value.numpy() for name, value in model.state_dict().items()}
            save_file(tensors, str(folder / "model.safetensors"), {"format": "np"})
            self.content[family] = json.loads((folder / "config.json").read_text())

    def copy(self, to: Path, family: str = "llama", **fields: Any) -> Path:
        folder = Path(shutil.copytree(self.root / family, to / f"{family}-copy", dirs_exist_ok=True))
        (folder / "config.json").write_text(json.dumps(self.content[family] | fields, indent=1))
        return folder


def build(folder: Path) -> Any:
    """Build the model of a folder and load its weights."""
    return build_model(ModelSource(folder, read_config(folder), from_weights=True))
