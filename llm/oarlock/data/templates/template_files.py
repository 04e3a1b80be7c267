"""Reading and writing the chat templates of a tokenizer folder, by the rules of transformers.

chat_template.jinja is the template "default"; files in additional_chat_templates/ are named after themselves. If there
are neither, tokenizer_config.json contains one text or a list of named ones.
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
_MAX_BYTES = 1 << 20  # the longest published templates have 50,000
_PROCESSOR_FILE = "chat_template.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def load_own_templates(tokenizer: PretrainedTokenizerBase) -> dict[str, str]:
    """Return the tokenizer's own Jinja templates by name.

    Raises:
        ConfigError: if transformers could not read them.
    """
    folder = Path(getattr(tokenizer, "name_or_path", "") or "")
    found = read_template_files(folder)
    if not found:
        inside = (getattr(tokenizer, "init_kwargs", None) or {}).get("chat_template")
        found = parse_named_templates(inside, str(folder))
    return found or read_folder_templates(folder)


def read_folder_templates(folder: Path) -> dict[str, str]:
    """Return the Jinja templates in the files of a folder by name."""
    found = read_template_files(folder)
    config = folder / "tokenizer_config.json"
    if not found and config.is_file():
        found = parse_named_templates(read_tokenizer_config(config).get("chat_template"), str(config))
    processor = folder / _PROCESSOR_FILE
    if not found and processor.is_file():
        found = parse_named_templates(read_json(processor, dict[str, Any]).get("chat_template"), str(processor))
        if not found:
            log_once(f"{processor}: PaddleNLP's own chat template format is not supported; use a Jinja file")
    return found


def read_template_files(folder: Path) -> dict[str, str]:
    """Return the templates that have a file of their own."""
    files = {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (folder / TEMPLATE_FILE).is_file():
        files = {DEFAULT: folder / TEMPLATE_FILE, **{name: p for name, p in files.items() if name != DEFAULT}}
    return {name: read_template(path) for name, path in files.items()}


def read_template(path: Path) -> str:
    """Read a Jinja file.

    Raises:
        ConfigError: if it can't be read.
    """
    return read_text(path, limit=_MAX_BYTES, what="chat template", error=ConfigError)


def parse_named_templates(value: Any, where: str) -> dict[str, str]:
    """Parse chat_template of tokenizer_config.json: a text, a list of {"name", "template"}, or a map of names to texts.

    Raises:
        ConfigError: for anything else, or a name that can't be a file name.
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
    """Save templates where readers look for them.

    The default template is saved in a file and, as a single text, in tokenizer_config.json: some readers do not know
    lists of named templates.
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
