"""Which files of a model or adapter folder are taken along, how they are copied, and who may read the copies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from oarlock.data.templates.template_files import TEMPLATE_FOLDER
from oarlock.environment.console import log_once
from oarlock.files import ADAPTER_FILE, PEFT_FILE, PEFT_WEIGHTS, umask
from oarlock.formats.links import open_inside

# What decides over texts and ids, in a model folder and in an adapter folder alike.
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
    """The files of a folder that patterns name, sorted."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def find_readers(*folders: Path) -> int:
    """The most permissions that a file made of some models and adapters has: those who may read all of their files.

    A private source (0600) makes a private result, and that is said.
    """
    readers, private = 0o044, None
    for path in (path for folder in folders for path in find_files(folder, _ANY_FILES)):
        own = path.stat().st_mode & 0o044
        if readers & ~own & ~umask():
            private = path
        readers &= own
    if private is not None:
        log_once(
            f"{private} has mode {private.stat().st_mode & 0o777:o}: what is made of it can be read by the same users "
            "alone (chmod changes that)"
        )
    return 0o600 | readers | readers >> 1


def link_files(source: Path, target: Path, patterns: Iterable[str], but: Iterable[Path] = ()) -> None:
    """Put the files that patterns name into a folder: hard links where the file system can, copies elsewhere.

    Args:
        but: places in the folder that are left out.

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
    """A hard link to a file of a folder (through links that stay in it), or a copy where there can be none."""
    with open_inside(source, name) as file:
        try:  # of what was opened, whatever the name is now
            os.link(f"/proc/self/fd/{file.fileno()}", target, src_dir_fd=file.fileno(), follow_symlinks=True)
        except OSError:  # another file system, one without links, or another user's file
            with open(target, "xb") as copy:
                shutil.copyfileobj(file, copy, 1 << 22)


def copy_file(source: Path, name: str | Path, target: Path) -> None:
    """A copy of a file of a folder; its mode is the umask's until the folder is finished (files.settle_file).

    Raises:
        ModelError: for a link that leads out of the source.
    """
    with open_inside(source, name) as file, open(target, "wb") as copy:
        shutil.copyfileobj(file, copy, 1 << 22)
