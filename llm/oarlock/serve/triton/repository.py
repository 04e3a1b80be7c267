"""Reads what a model repository holds, without loading its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarlock.errors import ConfigError
from oarlock.files import GENERATION_FILE
from oarlock.model_config.generation_config import read_generation_config, read_sampling_defaults
from oarlock.serve.config import EngineConfig
from oarlock.triton_repository.config_pbtxt import TRITON_CONFIG, read_triton_config


def find_engine_model(repository: Path) -> str:
    """Find the name of the model that has the engine."""
    found = [path.parents[1].name for path in repository.glob("*/1/model") if path.is_dir()]
    if len(found) != 1:
        raise ConfigError(f"{repository}: {len(found)} models with weights in this repository, not one")
    return found[0]


def read_chat_temperature(repository: Path) -> float:
    """Read the temperature of OpenAI requests that set none, from generation_config.json. The default is 1, as in vLLM.

    Raises:
        ModelError: when the file can't be read, or its temperature is out of range.
    """
    place = repository / find_engine_model(repository) / "1" / "model"
    content = read_generation_config(place) | {"do_sample": True}
    return float(read_sampling_defaults(content, str(place / GENERATION_FILE))["temperature"])


def read_engine_config(repository: Path, settings: Mapping[str, Any]) -> EngineConfig:
    """Read the engine's configuration in a repository's config.pbtxt.

    Args:
        settings: values that replace those of the repository.

    Raises:
        ConfigError: when a value is not a number, or out of range.
    """
    config = read_triton_config(repository / find_engine_model(repository) / TRITON_CONFIG)
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    return EngineConfig.from_parameters(parameters, settings)
