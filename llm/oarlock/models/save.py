"""Write a model folder that stands on its own: safetensors, config, tokenizer, chat template."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from oarlock.errors import ModelError
from oarlock.files import settle_file, sync_file, write_json

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedModel, PretrainedTokenizerBase

    from oarlock.data.templates import ChatTemplate

# What PaddleNLP notes about where a tokenizer was loaded from: a path of this machine, of no use on another.
_LOCAL_KEYS = ("name_or_path", "_from_auto", "special_tokens_map_file", "tokenizer_file", "vocab_file")


def save_tokenizer(tokenizer: PretrainedTokenizerBase, folder: Path, template: ChatTemplate | None) -> None:
    """The tokenizer's files and the template."""
    tokenizer.save_pretrained(str(folder))
    config_file = folder / "tokenizer_config.json"
    if config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        write_json(config_file, {key: value for key, value in config.items() if key not in _LOCAL_KEYS})
    if template is not None:
        template.save(folder)


def save_model(
    model: PretrainedModel,
    tokenizer: PretrainedTokenizerBase | None,
    template: ChatTemplate | None,
    folder: str | Path,
) -> None:
    """Write into `folder` (which may hold other things), each file complete before it gets its name.

    Raises:
        ModelError: when it can't be written; older files of the same names are then still there.
    """
    folder = Path(folder)
    partial = folder / ".model.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(str(partial), safe_serialization=True)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial, template)
        for path in sorted(partial.iterdir()):
            settle_file(path)
            os.replace(path, folder / path.name)
        sync_file(folder)
    except Exception as error:
        raise ModelError(f"{folder}: the model could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
