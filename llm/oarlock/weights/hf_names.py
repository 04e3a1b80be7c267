"""Names of weights in Hugging Face's files and in PaddleNLP's models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from oarlock.errors import ModelError
from oarlock.families.family import HFName
from oarlock.families.model_sizes import ModelSizes
from oarlock.families.registry import FAMILIES, explain_missing


class MappedTensor:
    """A tensor of a file and what makes it the model's."""

    def __init__(self, stored: str, mapping: Any = None) -> None:
        self.stored = stored
        self._mapping = mapping if mapping is not None and mapping.action is not None else None

    @property
    def as_stored(self) -> bool:
        """Whether nothing has to be done to it."""
        return self._mapping is None

    def convert(self, array: np.ndarray) -> np.ndarray:
        """From Hugging Face's layout to Paddle's (PaddleNLP's StateDictNameMapping says how); mostly a view."""
        return array if self._mapping is None else self._mapping.run({self.stored: array}, self.stored)


def map_names(model_class: Any, config: Any, stored: Mapping[str, Any], hugging_face: bool) -> dict[str, MappedTensor]:
    """The model's name of a tensor -> where it is in the files.

    Raises:
        ModelError: for a family that can't be read from Hugging Face's format.
    """
    if not hugging_face:
        return {name: MappedTensor(name) for name in stored}
    family = FAMILIES.get(config.model_type)
    if family is not None and not family.hf_weights:
        why = explain_missing(config.model_type, "hf_weights", "names of Hugging Face's format")
        raise ModelError(f"weights in Hugging Face's format: {why}; give them in Paddle's format")
    found = {}
    for names, mapping in hugging_face_names(model_class, config):
        mapping.source_name = next((name for name in names if name in stored), None)
        if mapping.source_name:
            found[mapping.target_name] = MappedTensor(mapping.source_name, mapping)
    return found


def find_unused(stored: Iterable[str], found: Mapping[str, MappedTensor]) -> tuple[str, ...]:
    """Names in the files that no tensor of the model comes from."""
    used = {tensor.stored for tensor in found.values()}
    return tuple(sorted(name for name in stored if name not in used))


def hugging_face_names(model_class: Any, config: Any) -> list[tuple[tuple[str, ...], Any]]:
    """What a tensor may be called in Hugging Face's files, and PaddleNLP's StateDictNameMapping for it.

    Those of ChatGLM2 lack the prefixes of both sides (paddlenlp 3.0.0b4).

    Returns:
        The first of the names is what Hugging Face's own models write.

    Raises:
        ModelError: for a family without them.
    """
    family = FAMILIES.get(config.model_type)
    if family is None or not family.hf_prefix:
        return _paddlenlp_names(model_class, config)
    own = family.hf_names if config.tie_word_embeddings else family.hf_untied_names or family.hf_names
    found = _registered_names(own, config) if own else _paddlenlp_names(model_class, config)
    prefix = family.hf_prefix
    return [
        ((name, name.removeprefix(prefix)) if name.startswith(prefix) else (name,), mapping)
        for (name, *_), mapping in found
    ]


def _registered_names(names: Iterable[HFName], config: Any) -> list[tuple[tuple[str, ...], Any]]:
    from paddlenlp.transformers.conversion_utils import StateDictNameMapping

    found: list[tuple[tuple[str, ...], Any]] = []
    for name in names:
        for layer in range(ModelSizes.from_config(config).num_layers) if ".N." in name.hf else (0,):
            hf, paddle = (text.replace(".N.", f".{layer}.") for text in (name.hf, name.paddle))
            found.append(((hf,), StateDictNameMapping(hf, paddle, "transpose" if name.transposed else None)))
    return found


def _paddlenlp_names(model_class: Any, config: Any) -> list[tuple[tuple[str, ...], Any]]:
    try:
        mappings = model_class._get_name_mappings(config)
    except (NotImplementedError, ImportError) as error:
        raise ModelError(
            f"PaddleNLP can't read Hugging Face weights of {model_class.__name__}: give them in Paddle's format"
        ) from error
    prefix = f"{model_class.base_model_prefix}."
    bare = not any(mapping.target_name.startswith(prefix) for mapping in mappings)
    found: list[tuple[tuple[str, ...], Any]] = []
    for mapping in mappings:
        names = (mapping.source_name, f"transformer.{mapping.source_name}") if bare else (mapping.source_name,)
        mapping.target_name = f"{prefix}{mapping.target_name}" if bare else mapping.target_name
        found.append((names, mapping))
    return found
