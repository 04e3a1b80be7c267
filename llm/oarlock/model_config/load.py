"""Reads a model folder's config.json, whichever side wrote it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import paddlenlp.transformers
from paddlenlp.transformers import AutoModelForCausalLM, PretrainedConfig
from paddlenlp.transformers.configuration_utils import LlmMetaConfig, flatten_model_config

from oarlock.decoder.classes import make_model_class
from oarlock.environment.console import log_once
from oarlock.errors import ModelError
from oarlock.families.registry import FAMILIES
from oarlock.formats.json_file import check_content, read_json
from oarlock.model_config.decoder_config import DecoderConfig, list_fields, make_config_class
from oarlock.model_config.family_detection import detect_family, detect_writer
from oarlock.model_config.hf_config import make_arguments
from oarlock.model_config.hf_fields import PLAN
from oarlock.model_config.schema import ConfigFields
from oarlock.model_config.size_check import check_sizes
from oarlock.model_config.tied_head import has_untied_head
from oarlock.weights.weight_folder import WeightFolder, has_safetensors

# The fields that PaddleNLP's configuration gets: those whose type and range are checked.
_SETTINGS = frozenset(ConfigFields.__annotations__)
_PICKLES = {"np": "model_state*.pdparams*", "pt": "pytorch_model*.bin*"}
_CAUSAL = ("ForCausalLM", "ForConditionalGeneration")


def detect_layout(folder: Path) -> str:
    """Detect the layout of a folder's weights: "np" (Paddle's) or "pt" (Hugging Face's).

    Raises:
        ModelError: when the folder is not a model, or its files are damaged or missing.
    """
    if not has_safetensors(folder):
        for layout, pattern in _PICKLES.items():
            if any(folder.glob(pattern)):
                return layout
    return WeightFolder.open(folder).layout


def read_config_content(folder: Path) -> dict[str, Any]:
    """Read config.json and check its fields against oarlock.model_config.schema.

    Raises:
        ModelError: when it is missing, or naming the field that is wrong.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(f"{folder}: no config.json in this folder, so it is not a model")
    return dict(read_json(path, ConfigFields, extra="allow"))


def check_config_content(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Check the fields of a config.json that read_config_content() did not read.

    Raises:
        ModelError: naming the field that is wrong.
    """
    return dict(check_content(dict(content), place, ConfigFields, extra="allow"))


def make_config(content: Mapping[str, Any], place: str) -> PretrainedConfig:
    """Make a configuration, PaddleNLP's or ours, from the content of a config.json of either side.

    PaddleNLP itself takes transformers' fields as they are, which silently loses a rotary base in transformers 5's
    format, or a scaling.

    Args:
        place: the file, for messages.

    Raises:
        ModelError: for a family that is not supported, or a field that the family's model does not compute with.
    """
    content = check_config_content(copy.deepcopy(dict(content)), place)
    content = check_config_content(flatten_model_config(content), place)  # older files of PaddleNLP are nested
    config_class = find_config_class(detect_family(content, place))
    how = LlmMetaConfig._get_defaults().keys() - PLAN  # options of a run's computation
    content = {name: value for name, value in content.items() if name not in how}
    arguments = make_arguments(content, place, find_fields(config_class))
    arguments = {name: value for name, value in arguments.items() if name in _SETTINGS}
    try:
        config = config_class.from_dict(arguments)
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        raise ModelError(f"{place}: PaddleNLP can't make a configuration from it: {error!r}") from error
    check_sizes(config, place)
    return config


def find_config_class(family: str) -> Any:
    """Find the configuration class of a family: ours if PaddleNLP has none."""
    if FAMILIES[family].own_config:
        return make_config_class(family)
    return getattr(paddlenlp.transformers, f"{FAMILIES[family].class_prefix}Config")


@cache
def find_fields(config_class: Any) -> frozenset[str]:
    """The fields of a configuration class, including older names."""
    if issubclass(config_class, DecoderConfig):
        return list_fields(config_class.model_type)
    return frozenset(vars(config_class())) | frozenset(config_class.attribute_map)


def detect_config_writer(folder: Path) -> str:
    """Detect which side wrote config.json: "np" (PaddleNLP) or "pt" (transformers)."""
    content = read_config_content(folder)
    return detect_writer(content, find_fields(find_config_class(detect_family(content, str(folder / "config.json")))))


def read_config(folder: Path) -> PretrainedConfig:
    """Read the configuration of the model in a folder, whichever side wrote it.

    An output layer that is stored and differs from the embedding is not tied to it, whatever the configuration says.

    Raises:
        ModelError: when it can't be read, or the family's model does not compute what it says.
    """
    config = make_config(read_config_content(folder), str(folder / "config.json"))
    if getattr(config, "tie_word_embeddings", False) and has_untied_head(folder, config.model_type):
        log_once(
            f"{folder}: config.json ties the output layer to the embedding (tie_word_embeddings), but the stored "
            "ones differ, so the model has both"
        )
        config.tie_word_embeddings = False
    return config


def find_model_class(config: PretrainedConfig, pipeline: bool = False) -> Any:
    """Find the model class of a configuration: our decoder's, or PaddleNLP's where the family has none.

    Of PaddleNLP's it is the one that "architectures" names, or the family's causal model.

    Raises:
        ModelError: when there is none.
    """
    family = FAMILIES.get(config.model_type)
    if family is not None and family.decoder is not None:
        return make_model_class(family.name, pipeline)
    name = str(config.architectures[0]) if config.architectures else ""
    # The automatic choice matches parts of names and mistakes "GPTJForCausalLM" for a GPT.
    found = getattr(paddlenlp.transformers, name, None) if name.endswith(_CAUSAL) else None
    if found is None:
        try:
            found = AutoModelForCausalLM._get_model_class_from_config(None, None, config)
        except (AttributeError, KeyError) as error:
            raise ModelError(f"PaddleNLP has no causal language model for the architecture {name!r}") from error
    if not pipeline:
        return found
    staged = getattr(paddlenlp.transformers, f"{found.__name__}Pipe", None)
    if staged is None:
        raise ModelError(f"PaddleNLP has no pipeline class for {found.__name__}: use --pipeline_parallel_degree 1")
    return staged
