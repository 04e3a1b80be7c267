"""Read a model folder's config.json, whichever side wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import paddlenlp.transformers
from paddlenlp.transformers import AutoConfig, PretrainedConfig

from oarlock.environment import say_once
from oarlock.errors import ModelError
from oarlock.models.hf_config import WORDS, from_hugging_face
from oarlock.models.tied_head import has_own_head
from oarlock.models.weights import WeightFolder, has_safetensors
from oarlock.parallel.families import FAMILIES

_PICKLES = {"np": "model_state*.pdparams*", "pt": "pytorch_model*.bin*"}


def layout_of(folder: Path) -> str:
    """Whose layout the weights of a folder have: "np" (Paddle's) or "pt" (Hugging Face's).

    Raises:
        ModelError: when the folder is none, or its files are damaged or missing.
    """
    if not has_safetensors(folder):
        for layout, pattern in _PICKLES.items():
            if any(folder.glob(pattern)):
                return layout
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


def config_of(content: Mapping[str, Any], place: str) -> PretrainedConfig:
    """PaddleNLP's configuration for the content of Hugging Face's config.json.

    Args:
        place: the file, for messages.

    Raises:
        ModelError: when PaddleNLP's model does not compute what it says.
    """
    arguments = from_hugging_face(content, place)
    name = f"{FAMILIES[content['model_type']].model.removesuffix('ForCausalLM')}Config"
    return getattr(paddlenlp.transformers, name)(**arguments)


def config_writer(folder: Path) -> str:
    """Whose words config.json is in: "np" (PaddleNLP's) or "pt" (transformers').

    Weights do not tell: PaddleNLP's own converters leave its configuration beside Hugging Face's weights.
    """
    content = config_content(folder)
    theirs = any(name in content for name in ("transformers_version", "torch_dtype", "rope_parameters"))
    return "pt" if theirs and "paddlenlp_version" not in content else "np"


def read_config(folder: Path) -> PretrainedConfig:
    """PaddleNLP's configuration of the model in a folder, whichever side wrote it.

    PaddleNLP takes a configuration of transformers as it stands, so that a rotary base in transformers 5's words, or a
    scaling, would be lost without a word. An output layer that is stored beside another embedding is not tied to it.

    Raises:
        ModelError: when it can't be read, or PaddleNLP's model does not compute what it says.
    """
    config = _read_config(folder)
    if getattr(config, "tie_word_embeddings", False) and has_own_head(folder, config.model_type):
        say_once(
            f"{folder}: config.json ties the output layer to the embedding (tie_word_embeddings), but the two that are "
            "stored differ: the model has both"
        )
        config.tie_word_embeddings = False
    return config


def _read_config(folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    content = config_content(folder)
    if content.get("model_type") in WORDS and config_writer(folder) == "pt":
        return config_of(content, str(path))
    try:
        return AutoConfig.from_pretrained(str(folder))
    except Exception as error:  # PaddleNLP raises KeyError, AttributeError, OSError, ... for a file it can't place
        raise ModelError(f"{path}: not a model configuration PaddleNLP knows: {error!r}") from error
