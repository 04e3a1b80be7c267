"""Detects the family of a config.json, and which side wrote it. Nothing here needs Paddle."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from oarlock.errors import ModelError
from oarlock.families.registry import BROKEN, FAMILIES, HF_CONFIGS
from oarlock.model_config.hf_fields import NEUTRAL, RECORDS, ROPE_FIELDS, TOKEN_IDS

_CLASS_ENDS = ("ForCausalLM", "ForCausalLMPipe", "ForConditionalGeneration", "LMHeadModel", "Model")
_MARKS = ("transformers_version", "torch_dtype", "rope_parameters")


def detect_family(content: Mapping[str, Any], place: str) -> str:
    """Detect the family of a config.json: one of oarlock.families.registry.

    Raises:
        ModelError: for any other, and for one that can't be run.
    """
    named = content.get("architectures") or []
    named = named if isinstance(named, list) else [named]
    family = content.get("model_type")
    if family is None:
        family = next((record.name for record in FAMILIES.values() if record.architecture in named), None)
    for record in FAMILIES.values():
        published = record.published_as
        if published is not None and family == published.model_type and published.field in content:
            family = record.name
    what = f"model_type {family!r}" if family is not None else f"neither a model_type nor a known class ({named})"
    if family in BROKEN:
        raise ModelError(f"{place}: {family} models can't be run here: {BROKEN[str(family)]}")
    if family not in FAMILIES:
        raise ModelError(f"{place}: {what} is not supported; Oarlock has {', '.join(FAMILIES)}")
    record = FAMILIES[family]
    prefixes = [record.class_prefix, *([record.published_as.class_prefix] if record.published_as else [])]
    other = [name for name in named if name not in {f"{prefix}{end}" for prefix in prefixes for end in _CLASS_ENDS}]
    if other:
        raise ModelError(
            f"{place}: architectures names {other[0]!r}, which is not a causal language model of model_type "
            f"{family!r} ({record.architecture}); Oarlock has {', '.join(FAMILIES)}"
        )
    return str(family)


def detect_writer(content: Mapping[str, Any], own: Collection[str]) -> str:
    """Detect which side wrote a configuration: "np" (PaddleNLP) or "pt" (transformers). Only defaults depend on it.

    The layout of the weights does not tell: PaddleNLP's converters keep its configuration next to Hugging Face's
    weights.

    Args:
        own: fields of PaddleNLP's configuration class.
    """
    if "paddlenlp_version" in content:
        return "np"
    if any(name in content for name in _MARKS):
        return "pt"
    words = HF_CONFIGS.get(str(content.get("model_type")))
    if words is None:
        return "np"
    if FAMILIES[content["model_type"]].own_config:
        return "pt"  # our own files have transformers' form
    both = ("hidden_act", "head_dim", "sliding_window", "use_sliding_window", "max_window_layers")
    theirs = {
        *both,
        *words.fields,
        *words.aliases,
        *words.supported,
        *TOKEN_IDS,
        *RECORDS,
        *ROPE_FIELDS,
        *NEUTRAL,
        *words.dropouts,
    }
    return "np" if any(name in own and name not in theirs for name in content) else "pt"
