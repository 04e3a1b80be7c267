"""The files of model and adapter folders: which ones are carried along, how, and who may read the copies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from oarlock.data.templates.template_files import TEMPLATE_FOLDER
from oarlock.environment.console import log_once
from oarlock.files import ADAPTER_FILE, PEFT_FILE, PEFT_WEIGHTS, umask
from oarlock.formats.links import open_inside

# The files that define texts and ids, in model folders and adapter folders alike.
TEXT_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("sentencepiece.*", "tekken.json", "chat_template*", f"{TEMPLATE_FOLDER}/*.jinja"),
)
MODEL_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *TEXT_FILES,
)
ADAPTER_FILES = (
    *(ADAPTER_FILE, "lora_config.json", "peft_model*.safetensors", "peft_model.safetensors.index.json"),
    *(PEFT_FILE, PEFT_WEIGHTS),
)
_ANY_FILES = (*MODEL_FILES, *ADAPTER_FILES, "rank-*.safetensors", "*.bin", "*.pdparams")


def find_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """List the files of a folder that match patterns, sorted."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def find_readers(*folders: Path) -> int:
    """Compute the permissions of a file made from models and adapters: those who may read all of their files.

    A private source (0600) makes a private result, and a message says so.
    """
    readers, private = 0o044, None
    for path in (path for folder in folders for path in find_files(folder, _ANY_FILES)):
        own = path.stat().st_mode & 0o044
        if readers & ~own & ~umask():
            private = path
        readers &= own
    if private is not None:
        log_once(
            f"{private} has mode {private.stat().st_mode & 0o777:o}: only the same users can read what is made from it "
            "(chmod changes that)"
        )
    return 0o600 | readers | readers >> 1


def link_files(source: Path, target: Path, patterns: Iterable[str], but: Iterable[Path] = ()) -> None:
    """Put the files that match patterns into a folder, as hard links if the file system can, else as copies.

    Args:
        but: paths in the folder to leave out.

    Raises:
        ModelError: for a link that leads out of the source.
    """
    left_out = set(but)
    target.mkdir(parents=True, exist_ok=True)
    for path in find_files(source, patterns):
        name = path.relative_to(source)
        if name not in left_out:
            (target / name).parent.mkdir(exist_ok=True)
            link_file(source, name, target / name)


def link_file(source: Path, name: str | Path, target: Path) -> None:
    """Make a hard link to a file of a folder (through links that stay in it), or a copy if that is impossible."""
    with open_inside(source, name) as file:
        try:  # to the opened file, even if the name was replaced
            os.link(f"/proc/self/fd/{file.fileno()}", target, src_dir_fd=file.fileno(), follow_symlinks=True)
        except OSError:  # another file system, one without hard links, or another user's file
            with open(target, "xb") as copy:
                shutil.copyfileobj(file, copy, 1 << 22)


def copy_file(source: Path, name: str | Path, target: Path) -> None:
    """Copy a file of a folder. The umask sets its mode until the folder is finished (files.settle_file).

    Raises:
        ModelError: for a link that leads out of the source.
    """
    with open_inside(source, name) as file, open(target, "wb") as copy:
        shutil.copyfileobj(file, copy, 1 << 22)
