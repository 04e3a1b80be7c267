"""The model classes of the families that our decoder computes."""

from __future__ import annotations

from functools import cache
from typing import Any

from oarlock.decoder.model import DecoderForCausalLM
from oarlock.decoder.pipeline import DecoderForCausalLMPipe
from oarlock.families.registry import FAMILIES


@cache
def make_model_class(name: str, pipeline: bool = False) -> Any:
    """Make the class of a family: `Qwen3ForCausalLM`, or `Qwen3ForCausalLMPipe` for pipeline stages."""
    family = FAMILIES[name]
    base: Any = DecoderForCausalLMPipe if pipeline else DecoderForCausalLM
    return type(family.architecture + ("Pipe" if pipeline else ""), (base,), {"family": family})
