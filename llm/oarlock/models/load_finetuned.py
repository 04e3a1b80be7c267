"""Load a fine-tuned model for use: a full one, or a base with an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarlock.data.templates.chat_template import choose_template
from oarlock.data.tokenizers.load import has_tokenizer, load_tokenizer
from oarlock.errors import ModelError
from oarlock.files import holds_adapter
from oarlock.model_config.generation_config import find_end_tokens
from oarlock.model_config.load import find_model_class, read_config
from oarlock.model_config.model_folder import find_model_folder
from oarlock.models.build import ModelSource, build_model
from oarlock.peft.adapter_base import find_base
from oarlock.peft.adapter_folder import UNKNOWN_BASE, Base
from oarlock.peft.method import restore_method
from oarlock.peft.open_adapter import open_adapter

if TYPE_CHECKING:
    from oarlock.data.templates.chat_template import ChatTemplate


@dataclass(frozen=True)
class FinetunedModel:
    """A model with what it takes to ask it questions.

    Attributes:
        model: in evaluation mode.
        template: that the model was trained with.
        ends: tokens that end an answer.
        folder: of the model (the base of an adapter).
    """

    model: Any
    tokenizer: Any
    template: ChatTemplate
    ends: tuple[int, ...]
    folder: Path


def load_finetuned(name_or_path: str, base: str | None = None) -> FinetunedModel:
    """Load a model folder, or an adapter folder with the base it was trained on.

    Args:
        base: where that base is now, if it was moved.

    Raises:
        ModelError: when something is missing, or the base is not the adapter's.
    """
    adapter = Path(name_or_path) if holds_adapter(name_or_path) else None
    if adapter is None and base is not None:
        raise ModelError(f"{name_or_path} is a full model; only an adapter needs a base")
    found = open_adapter(adapter) if adapter else None
    if found is not None and base is None:
        folder = find_base(found, "Name it: --base DIR")
    else:
        folder = find_model_folder(base or name_or_path, with_weights=True)
    if found is not None:
        check_base(found.base, Base.from_folder(str(folder), folder))
    source = ModelSource(folder, read_config(folder), from_weights=True)
    tokenizer = load_tokenizer(str(adapter if adapter and has_tokenizer(adapter) else folder))
    if found is not None:
        found = found.map_to_model(find_model_class(source.config), source.config)
    method = restore_method(found.method, found.settings) if found else None
    model = build_model(source, method=method, adapter=adapter)
    model.eval()
    ends = find_end_tokens(source.generation(), source.config, tokenizer)
    return FinetunedModel(model, tokenizer, choose_template("auto", tokenizer, "src_tgt"), ends, folder)


def check_base(trained_on: Base, given: Base) -> None:
    """Refuse a base that is not the one an adapter was trained on.

    Raises:
        ModelError: naming both.
    """
    if trained_on.fingerprint not in (given.fingerprint, UNKNOWN_BASE):
        raise ModelError(
            f"{given.name} is not the base of this adapter: it was trained on {trained_on.name}, whose weights had the "
            f"fingerprint {trained_on.fingerprint[:12] or 'none'}, and these have {given.fingerprint[:12] or 'none'}"
        )
