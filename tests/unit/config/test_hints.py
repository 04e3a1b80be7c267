"""Every flag and every `oarlock` command that a message suggests exists."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from oarlock.cli.main import make_parser
from oarlock.cli.parser import CommandParser
from oarlock.config import FinetuneConfig, PretrainConfig
from oarlock.config.options import list_option_specs

PACKAGE = Path(__file__).resolve().parents[3] / "llm" / "oarlock"
_FLAG = re.compile(r"(?<![\w-])--([a-zA-Z][\w-]*)")
_COMMAND = re.compile(r"`oarlock ([^`]*)`")
# Flags of other programs: launchers, compilers, servers, pip.
FOREIGN_FILES = {
    *("launch/command.py", "launch/slurm.py"),
    *("export/start_scripts.py", "export/servers.py", "config/synonyms.py", "parallel/launch_command.py"),
    *("serve/triton/server.py", "launch/command.py", "launch/slurm.py"),
}
FOREIGN_FLAGS = {
    "option",
    "dataset-impl",
    "append-eod",
    "append_eos",
    "shm-size",
    "gpus",
    "devices",
    "nnodes",
    "nproc_per_node",
    "log_dir",
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The string literals of a file without docstrings; in f-strings {} stands for values."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            inner.add(id(node.value))
        if isinstance(node, ast.JoinedStr) and id(node) not in inner:
            inner |= {id(part) for part in ast.walk(node) if part is not node}
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.lineno, node.value


def commands() -> dict[str, argparse.ArgumentParser]:
    """ "data pretrain" -> its parser."""
    found: dict[str, argparse.ArgumentParser] = {}

    def walk(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> None:
        if isinstance(parser, CommandParser):
            parser.add_flags()
        found[" ".join(words)] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, inner in action.choices.items():
                    walk(inner, (*words, name))

    walk(make_parser(), ())
    return found


COMMANDS = commands()
OPTIONS = {
    spelling
    for kind in (FinetuneConfig, PretrainConfig)
    for name, spec in list_option_specs(kind).items()
    for spelling in (name, *spec.aliases)
} | {"help", "print_config", "print-config"}
FLAGS = OPTIONS | {
    word.removeprefix("--") for parser in COMMANDS.values() for a in parser._actions for word in a.option_strings
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).as_posix() not in FOREIGN_FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_flags_and_commands_in_messages_exist(path):
    for line, text in texts(path):
        for command in _COMMAND.findall(text):
            words = command.split()
            name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS), None)
            assert name or not words or words[0].startswith("-"), f"{path}:{line}: there is no `oarlock {command}`"
            known = set(COMMANDS[name or ""]._option_string_actions)
            assert set(re.findall(r"--[\w-]+", command)) <= known, f"{path}:{line}: `oarlock {command}`"
        for flag in _FLAG.findall(_COMMAND.sub("", text)):
            assert flag in FOREIGN_FLAGS or flag in FLAGS or flag.removeprefix("no_") in FLAGS, (
                f"{path}:{line}: --{flag} in {text!r}"
            )
