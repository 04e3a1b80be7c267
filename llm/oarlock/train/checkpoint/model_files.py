"""The files of a model or adapter folder other than weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarlock.files import write_json
from oarlock.peft.adapter_folder import ADAPTER_FILE, describe_adapter
from oarlock.weights.save import save_config, save_generation, save_tokenizer

if TYPE_CHECKING:
    from oarlock.data.templates.chat_template import ChatTemplate
    from oarlock.peft.adapter_folder import Base
    from oarlock.peft.method import Method


@dataclass(frozen=True)
class ModelFiles:
    """Everything besides weights that makes a folder a model or adapter.

    Attributes:
        config: the model's PretrainedConfig.
        tokenizer: the tokenizer, or None if there is none to save.
        generation: content of generation_config.json.
        method, base: fine-tuning method and base model of an adapter; None if all weights are trained.
    """

    config: Any
    tokenizer: Any = None
    template: ChatTemplate | None = None
    generation: Mapping[str, Any] | None = None
    method: Method | None = None
    base: Base | None = None

    def write(self, folder: Path) -> None:
        """Write config.json, generation_config.json, adapter.json, the tokenizer and the chat template."""
        save_config(self.config, folder)
        save_generation(self.generation or {}, folder)
        if self.method is not None and self.base is not None:
            write_json(folder / ADAPTER_FILE, describe_adapter(self.method, self.base, self.config.dtype))
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder, self.template)
