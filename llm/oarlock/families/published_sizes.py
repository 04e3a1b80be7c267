"""The sizes of published models, from which those of a new model are derived.

published_sizes.json has the fields of their config.json that decide sizes and computation. Each is named for its
repository on Hugging Face, whose parameter count is there too where it is known: tests compare it with ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class PublishedSize:
    """A published model.

    Attributes:
        name: repository on Hugging Face.
        fields: of its config.json, by transformers' names.
        parameters: number of its parameters; None where it is not known.
    """

    name: str
    fields: Mapping[str, Any]
    parameters: int | None


@cache
def read_published_sizes() -> Mapping[str, tuple[PublishedSize, ...]]:
    """Read the published models of every family of our decoder, from the smallest to the largest."""
    text = resources.files("oarlock.families").joinpath("published_sizes.json").read_text(encoding="utf-8")
    found = {}
    for family, entry in json.loads(text).items():
        models = [(name, {**entry["settings"], **own}) for name, own in entry["models"].items()]
        found[family] = tuple(PublishedSize(name, own, own.pop("parameters", None)) for name, own in models)
    return found
