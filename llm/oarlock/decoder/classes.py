"""The model classes of the families that our decoder computes."""

from __future__ import annotations

from typing import Any

from oarlock.decoder.model import DecoderForCausalLM
from oarlock.decoder.pipeline import DecoderForCausalLMPipe
from oarlock.families.registry import FAMILIES

_classes: dict[tuple[str, bool], Any] = {}  # functools.cache makes two of f(x) and f(x, pipeline=False)


def make_model_class(name: str, pipeline: bool = False) -> Any:
    """Make the class of a family, once: `Qwen3ForCausalLM`, or `Qwen3ForCausalLMPipe` for pipeline stages."""
    if (name, pipeline) not in _classes:
        family = FAMILIES[name]
        base: Any = DecoderForCausalLMPipe if pipeline else DecoderForCausalLM
        _classes[name, pipeline] = type(family.architecture + ("Pipe" if pipeline else ""), (base,), {"family": family})
    return _classes[name, pipeline]
