"""Read a model folder's config.json, whichever side wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import paddlenlp.transformers
from paddlenlp.transformers import AutoConfig, PretrainedConfig

from oarlock.errors import ModelError
from oarlock.models.hf_config import from_hugging_face
from oarlock.models.weights import WeightFolder, has_safetensors
from oarlock.parallel.families import FAMILIES


def layout_of(folder: Path) -> str:
    """Whose layout the weights of a folder have: "np" (Paddle's) or "pt" (Hugging Face's).

    Raises:
        ModelError: when the folder is none, or its files are damaged or missing.
    """
    if not has_safetensors(folder):
        if any(folder.glob("pytorch_model*.bin*")) and not any(folder.glob("model_state*.pdparams*")):
            return "pt"
        if any(folder.glob("model_state*.pdparams*")):
            return "np"
    with WeightFolder.open(folder) as weights:
        return weights.layout


def config_content(folder: Path) -> dict[str, Any]:
    """config.json as it stands.

    Raises:
        ModelError: when there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: no config.json in this folder, so it is not a model") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a JSON object")
    return content


def read_config(folder: Path, layout: str) -> PretrainedConfig:
    """PaddleNLP's configuration of the model in a folder.

    Args:
        layout: "np" or "pt", who wrote config.json.

    Raises:
        ModelError: when it can't be read, or PaddleNLP's model does not compute what it says.
    """
    path = folder / "config.json"
    content = config_content(folder)
    if layout == "pt":
        arguments = from_hugging_face(content, str(path))
        name = f"{FAMILIES[content['model_type']].model.removesuffix('ForCausalLM')}Config"
        return getattr(paddlenlp.transformers, name)(**arguments)
    try:
        return AutoConfig.from_pretrained(str(folder))
    except Exception as error:  # PaddleNLP raises KeyError, AttributeError, OSError, ... for a file it can't place
        raise ModelError(f"{path}: not a model configuration PaddleNLP knows: {error!r}") from error
