"""Where a tokenizer's folder keeps its chat templates: read and written by transformers' rules.

chat_template.jinja is the one named "default", files of additional_chat_templates/ are named by themselves; where there
is neither, tokenizer_config.json holds one text or a list of named ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarlock.data.tokenizers.schema import read_tokenizer_config
from oarlock.environment.console import log_once
from oarlock.errors import ConfigError
from oarlock.files import write_json, write_text_atomically
from oarlock.formats.files import read_text
from oarlock.formats.json_file import read_json

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
DEFAULT, TOOL_USE = "default", "tool_use"
_LARGEST = 1 << 20  # bytes; the longest published have 50,000
_PROCESSOR_FILE = "chat_template.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def own_templates(tokenizer: PretrainedTokenizerBase) -> dict[str, str]:
    """The Jinja templates a tokenizer came with, by name; none is an empty dictionary.

    Raises:
        ConfigError: where they are not what transformers reads.
    """
    folder = Path(getattr(tokenizer, "name_or_path", "") or "")
    found = templates_in_files(folder)
    if not found:
        inside = (getattr(tokenizer, "init_kwargs", None) or {}).get("chat_template")
        found = named_templates(inside, str(folder))
    return found or templates_in_folder(folder)


def templates_in_folder(folder: Path) -> dict[str, str]:
    """The same for the files of a folder alone."""
    found = templates_in_files(folder)
    config = folder / "tokenizer_config.json"
    if not found and config.is_file():
        found = named_templates(read_tokenizer_config(config).get("chat_template"), str(config))
    processor = folder / _PROCESSOR_FILE
    if not found and processor.is_file():
        found = named_templates(read_json(processor, dict[str, Any]).get("chat_template"), str(processor))
        if not found:
            log_once(f"{processor}: PaddleNLP's own form of a chat template is not read; give a Jinja file")
    return found


def templates_in_files(folder: Path) -> dict[str, str]:
    """Those in files of their own."""
    files = {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (folder / TEMPLATE_FILE).is_file():
        files = {DEFAULT: folder / TEMPLATE_FILE, **{name: p for name, p in files.items() if name != DEFAULT}}
    return {name: read_template(path) for name, path in files.items()}


def read_template(path: Path) -> str:
    """The Jinja text of a file.

    Raises:
        ConfigError: when it can't be read.
    """
    return read_text(path, limit=_LARGEST, what="chat template", error=ConfigError)


def named_templates(value: Any, where: str) -> dict[str, str]:
    """What tokenizer_config.json holds: a text, a list of {"name", "template"}, or names with their texts.

    Raises:
        ConfigError: for anything else, and names that are no file names.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    pairs: Any = value.items() if isinstance(value, dict) else None
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        pairs = [(entry.get("name"), entry.get("template")) for entry in value]
    found = {}
    for name, text in pairs if pairs is not None else [(None, None)]:
        if not (isinstance(name, str) and isinstance(text, str) and _NAME.fullmatch(name)):
            raise ConfigError(f"{where}: chat_template must be a string, or a list of objects with name and template")
        found[name] = text
    return found


def save_templates(folder: Path, templates: Mapping[str, str]) -> None:
    """Put templates where readers look for them.

    The default one stands in a file and in tokenizer_config.json; there as a text, which readers understand that know
    no list of named ones.
    """
    for name, text in templates.items():
        if name != DEFAULT:
            (folder / TEMPLATE_FOLDER).mkdir(exist_ok=True)
            write_text_atomically(folder / TEMPLATE_FOLDER / f"{name}.jinja", text)
    if DEFAULT not in templates:
        return
    write_text_atomically(folder / TEMPLATE_FILE, templates[DEFAULT])
    config_file = folder / "tokenizer_config.json"
    if config_file.is_file():
        config = read_tokenizer_config(config_file)
        write_json(config_file, {**config, "chat_template": templates[DEFAULT]})
