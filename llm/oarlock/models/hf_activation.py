"""Activations of a configuration in Hugging Face's words and in PaddleNLP's; what hf_words' tables can't say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarlock.errors import ModelError
from oarlock.models.hf_words import ACTIVATION_FIELDS, ACTIVATIONS


def activation_from(family: str, content: Mapping[str, Any], place: str, writer: str) -> dict[str, Any]:
    """Arguments of PaddleNLP's configuration for the activation (and OPT's projected embedding).

    Args:
        writer: "np" or "pt" (see hf_config.writer_of).

    Raises:
        ModelError: for an activation that PaddleNLP's model does not have.
    """
    if family == "gemma":
        return _gemma_activation(content, place, writer)
    if family == "opt":
        projected, hidden = content.get("word_embed_proj_dim"), content.get("hidden_size")
        check_opt(projected, hidden, place)
        given = projected or hidden
        return {"word_embed_proj_dim": given} if given else {}
    name = ACTIVATION_FIELDS.get(family)
    if name is None or name not in content:
        return {}
    if content[name] not in ACTIVATIONS:
        raise ModelError(
            f"{place}: {name} is {short(content[name])}, and PaddleNLP's {family} computes with "
            f"{', '.join(ACTIVATIONS)} alone"
        )
    return {name: ACTIVATIONS[content[name]]}


def _gemma_activation(content: Mapping[str, Any], place: str, writer: str) -> dict[str, Any]:
    """ "gelu" alone is how the first Gemmas were published, and means the approximation (transformers says so)."""
    act, newer = content.get("hidden_act"), content.get("hidden_activation")
    approximate = ("gelu", "gelu_pytorch_tanh", "gelu_new", None)
    if writer == "np" and act in ("gelu", None) and newer in ("gelu", None):
        return {"hidden_act": "gelu"}  # PaddleNLP's word for the exact one
    if act == "gelu_python" and newer in ("gelu", None):
        return {"hidden_act": "gelu"}
    if act in approximate and newer in approximate[1:]:
        return {"hidden_act": "gelu_pytorch_tanh"}
    named = f"hidden_act is {act!r}" + (f" and hidden_activation {newer!r}" if newer is not None else "")
    raise ModelError(
        f"{place}: {named}, and PaddleNLP's gemma computes with gelu_pytorch_tanh, or with gelu_python and gelu, alone"
    )


def check_opt(projected: int | None, hidden: int | None, place: str) -> None:
    """Refuse an OPT whose embedding has another size than its layers.

    Raises:
        ModelError: naming both sizes.
    """
    if projected and projected != hidden:
        raise ModelError(
            f"{place}: word_embed_proj_dim {projected} is not hidden_size {hidden}: PaddleNLP's OPT can't run that "
            "(its output layer has the hidden size)"
        )


def gemma_activation_to(config: Any) -> dict[str, str]:
    """Both of Gemma's fields: transformers takes "gelu" in hidden_act for the approximation; vLLM goes by the other."""
    exact = config.hidden_act != "gelu_pytorch_tanh"
    names = ("gelu_python", "gelu") if exact else ("gelu_pytorch_tanh", "gelu_pytorch_tanh")
    return {"hidden_act": names[0], "hidden_activation": names[1]}


def short(value: Any) -> str:
    """A value for a message, in at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
