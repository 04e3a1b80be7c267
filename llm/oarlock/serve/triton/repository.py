"""What a model repository says of itself, without loading it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from oarlock import __version__
from oarlock.environment.console import log_once
from oarlock.errors import ConfigError
from oarlock.files import GENERATION_FILE
from oarlock.formats.links import check_links
from oarlock.model_config.generation_config import read_generation_config, read_sampling_defaults
from oarlock.serve.engine.limits import Settings
from oarlock.triton_repository.config_pbtxt import TRITON_CONFIG, read_triton_config
from oarlock.triton_repository.model_code import foreign_code


def repository_models(repository: Path) -> tuple[str, ...]:
    """Names of the models in a repository.

    Raises:
        ConfigError: when there is none with our engine.
    """
    check_links(repository, error=ConfigError)
    found = tuple(sorted(path.parent.name for path in repository.glob(f"*/{TRITON_CONFIG}")))
    if not found:
        raise ConfigError(f"{repository}: no model repository (oarlock export --target triton --output DIR makes one)")
    engine_model(repository)
    if changed := foreign_code(repository):
        more = f" (and {len(changed) - 1:,} more)" if len(changed) > 1 else ""
        log_once(
            f"{repository}: {changed[0]}{more} is not the code of this version of Oarlock ({__version__}), "
            "and it is run: serve what you exported yourself"
        )
    return found


def engine_model(repository: Path) -> str:
    """The name of the model that has the engine."""
    found = [path.parents[1].name for path in repository.glob("*/1/model") if path.is_dir()]
    if len(found) != 1:
        raise ConfigError(f"{repository}: {len(found)} models with weights in this repository, not one")
    return found[0]


def chat_temperature(repository: Path) -> float:
    """Of OpenAI's requests that name none: that of the model's generation_config.json, else OpenAI's 1, as in vLLM.

    Raises:
        ModelError: when the file can't be read, or holds no temperature that tokens can be chosen by.
    """
    place = repository / engine_model(repository) / "1" / "model"
    content = read_generation_config(place) | {"do_sample": True}
    return float(read_sampling_defaults(content, str(place / GENERATION_FILE))["temperature"])


def engine_settings(repository: Path, limits: Mapping[str, Any]) -> Settings:
    """The limits of a repository's config.pbtxt, and over them those that were given."""
    config = read_triton_config(repository / engine_model(repository) / TRITON_CONFIG)
    return Settings.read({name: value.string_value for name, value in config.parameters.items()}, limits)


def setting_names() -> tuple[str, ...]:
    """Of the parameters of a config.pbtxt that a server reads."""
    return tuple(item.name for item in fields(Settings))
