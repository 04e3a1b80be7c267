"""The model families that Oarlock supports."""

from __future__ import annotations

from oarlock.errors import ModelError
from oarlock.families.dense import (
    gemma,
    gemma2,
    gemma3_text,
    glm4,
    granite,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from oarlock.families.experts import deepseek_v2, deepseek_v3, mixtral, qwen2_moe, qwen3_moe
from oarlock.families.family import Family, HFConfig
from oarlock.families.paddlenlp import bloom, chatglm, chatglm_v2, glm, gptj, opt

_MODULES = (
    *(llama, qwen2, qwen3, mistral, gemma, gemma2, gemma3_text, phi3, glm4, olmo2, smollm3, granite),
    *(mixtral, qwen2_moe, qwen3_moe, deepseek_v2, deepseek_v3),
    *(opt, bloom, chatglm, chatglm_v2, glm, gptj),
)

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}

# The families that transformers has too.
HF_CONFIGS: dict[str, HFConfig] = {
    family.name: family.hf_config for family in FAMILIES.values() if family.hf_config is not None
}

# Families that people ask for and that can't be run: name -> reason.
BROKEN = {
    "gpt_oss": "our decoder's experts have neither biases nor gpt-oss's clamped activation, and its files hold all "
    "experts of a layer in one tensor",
    "gemma3": "its published files from 4B on are those of a model for images and text; only text models (gemma3_text) "
    "are supported",
}


def find_family(name: str) -> Family:
    """The record of a family.

    Raises:
        ModelError: when it is not supported.
    """
    if name in BROKEN:
        raise ModelError(f"{name} models can't be run here: {BROKEN[name]}")
    if name not in FAMILIES:
        raise ModelError(f"model_type {name!r} is not supported; Oarlock has {', '.join(FAMILIES)}")
    return FAMILIES[name]


def find_hf_config(name: str) -> HFConfig:
    """Find the mapping of a family's configuration to transformers'.

    Raises:
        ModelError: for a family that transformers or PaddleNLP does not have, with the reason.
    """
    if name in HF_CONFIGS:
        return HF_CONFIGS[name]
    if name in BROKEN:
        reason = f"{name} can't be run here (see `oarlock families`)"
    else:
        reasons = FAMILIES[name].why_not if name in FAMILIES else {}
        reason = reasons.get("hf_config", "PaddleNLP and transformers do not both have it")
    raise ModelError(f"{name}: {reason}; families that can be converted: {', '.join(HF_CONFIGS)}")


def explain_missing(name: str, attribute: str, needs: str) -> str:
    """Explain why a family lacks something, as the rest of a sentence.

    Args:
        attribute: of Family, that is False or empty.
        needs: what PaddleNLP would have to have, if there is no better reason.
    """
    if name in FAMILIES and attribute in FAMILIES[name].why_not:
        return f"{name} has none: {FAMILIES[name].why_not[attribute]}"
    others = ", ".join(family.name for family in FAMILIES.values() if getattr(family, attribute))
    return f"PaddleNLP has no {needs} for {name} (it has for {others})"


def make_families_table() -> str:
    """Make a Markdown table of what each family supports, with numbered reasons for what it lacks."""
    heads = ("family", "LoRA", "prefix", "p-tuning", "tensor parallel", "pipeline", "sequence parallel", "Hugging Face")
    rows = [heads, tuple("---" for _ in heads)]
    notes: list[str] = []

    def number(reason: str) -> int:
        if reason not in notes:
            notes.append(reason)
        return notes.index(reason) + 1

    for name, family in FAMILIES.items():
        cells = [name, "yes"]  # LoRA and p-tuning need nothing of a family
        for attribute in ("kv_axes", "p_tuning", "tensor_parallel", "pipeline", "sequence_parallel", "hf_weights"):
            if attribute in family.why_not:
                cells.append(f"no ({number(family.why_not[attribute])})")
            else:
                cells.append("yes" if getattr(family, attribute, True) else "no")
        rows.append(tuple(cells))
    rows += [(name, *[f"no ({number(reason)})"] * (len(heads) - 1)) for name, reason in BROKEN.items()]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    numbered = [f"{i}. {note[0].upper()}{note[1:]}." for i, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *numbered])
