"""Names of weights in Hugging Face's files and in the models here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from oarlock.errors import ModelError
from oarlock.families.architecture import Architecture
from oarlock.families.decoder_weights import HF_PREFIX, list_full_names
from oarlock.families.model_sizes import ModelSizes
from oarlock.families.registry import FAMILIES, explain_missing


class MappedTensor:
    """A tensor in a file, and how it becomes the model's."""

    def __init__(self, stored: str, mapping: Any = None) -> None:
        self.stored = stored
        self._mapping = mapping if mapping is not None and mapping.action is not None else None

    @property
    def as_stored(self) -> bool:
        """Whether the model uses it as it is stored."""
        return self._mapping is None

    def convert(self, array: np.ndarray) -> np.ndarray:
        """Convert Hugging Face's layout to Paddle's with PaddleNLP's StateDictNameMapping, usually as a view."""
        return array if self._mapping is None else self._mapping.run({self.stored: array}, self.stored)


def map_names(model_class: Any, config: Any, stored: Mapping[str, Any], hugging_face: bool) -> dict[str, MappedTensor]:
    """Map the model's names to tensors of the files.

    Raises:
        ModelError: for a family whose weights can't be read in Hugging Face's format.
    """
    if not hugging_face:
        return {name: MappedTensor(name) for name in stored}
    family = FAMILIES.get(config.model_type)
    if family is not None and not family.hf_weights:
        why = explain_missing(config.model_type, "hf_weights", "names of Hugging Face's format")
        raise ModelError(f"weights in Hugging Face's format: {why}; provide them in Paddle's format")
    found = {}
    for names, mapping in list_hf_names(model_class, config):
        mapping.source_name = next((name for name in names if name in stored), None)
        if mapping.source_name:
            found[mapping.target_name] = MappedTensor(mapping.source_name, mapping)
    return found


def find_unused(stored: Iterable[str], found: Mapping[str, MappedTensor]) -> tuple[str, ...]:
    """List the names in the files that no tensor of the model comes from."""
    used = {tensor.stored for tensor in found.values()}
    return tuple(sorted(name for name in stored if name not in used))


def list_hf_names(model_class: Any, config: Any) -> list[tuple[tuple[str, ...], Any]]:
    """List what each tensor may be called in Hugging Face's files, with PaddleNLP's StateDictNameMapping for it.

    PaddleNLP's names of ChatGLM2 lack the prefixes of both sides (3.0.0b4).

    Returns:
        For each tensor, its names (Hugging Face's own models write the first one) and the mapping.

    Raises:
        ModelError: for a family without names in Hugging Face's format.
    """
    family = FAMILIES.get(config.model_type)
    if family is not None and family.decoder is not None:
        return _list_decoder_names(family.decoder(config))
    if family is None or not family.hf_prefix:
        return _list_paddlenlp_names(model_class, config)
    from paddlenlp.transformers.conversion_utils import StateDictNameMapping

    own = family.hf_names if config.tie_word_embeddings else family.hf_untied_names or family.hf_names
    found: list[tuple[tuple[str, ...], Any]] = []
    for tensor in own:
        for layer in range(ModelSizes.from_config(config).num_layers) if ".N." in tensor.hf else (0,):
            hf, paddle = (text.replace(".N.", f".{layer}.") for text in (tensor.hf, tensor.paddle))
            found.append(((hf,), StateDictNameMapping(hf, paddle, "transpose" if tensor.transposed else None)))
    found = found or _list_paddlenlp_names(model_class, config)
    prefix = family.hf_prefix
    return [
        ((name, name.removeprefix(prefix)) if name.startswith(prefix) else (name,), mapping)
        for (name, *_), mapping in found
    ]


def _list_decoder_names(model: Architecture) -> list[tuple[tuple[str, ...], Any]]:
    """List the names of our decoder: they differ by the first component, and matrices are transposed."""
    from paddlenlp.transformers.conversion_utils import StateDictNameMapping

    found: list[tuple[tuple[str, ...], Any]] = []
    for (hf, weight), (paddle, _) in zip(list_full_names(model, HF_PREFIX), list_full_names(model), strict=True):
        found.append(((hf,), StateDictNameMapping(hf, paddle, "transpose" if weight.is_matrix else None)))
    return found


def _list_paddlenlp_names(model_class: Any, config: Any) -> list[tuple[tuple[str, ...], Any]]:
    try:
        mappings = model_class._get_name_mappings(config)
    except (NotImplementedError, ImportError) as error:
        raise ModelError(
            f"PaddleNLP can't read Hugging Face weights of {model_class.__name__}: provide them in Paddle's format"
        ) from error
    prefix = f"{model_class.base_model_prefix}."
    bare = not any(mapping.target_name.startswith(prefix) for mapping in mappings)
    found: list[tuple[tuple[str, ...], Any]] = []
    for mapping in mappings:
        names = (mapping.source_name, f"transformer.{mapping.source_name}") if bare else (mapping.source_name,)
        mapping.target_name = f"{prefix}{mapping.target_name}" if bare else mapping.target_name
        found.append((names, mapping))
    return found
