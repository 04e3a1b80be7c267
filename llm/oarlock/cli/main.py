"""Entry point of the `oarlock` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from oarlock.cli.commands import (
    admin,
    ask,
    chat,
    checkpoint,
    convert,
    data,
    doctor,
    export,
    launch,
    merge,
    model,
    recipes,
    rehearse,
    resize,
    serve,
    train,
)
from oarlock.cli.flags import AnyCommand
from oarlock.cli.parser import add_commands, run_parsed
from oarlock.environment.signals import exit_on_sigterm
from oarlock.errors import exit_with
from oarlock.versions import format_versions

COMMANDS: tuple[AnyCommand, ...] = (
    data.COMMAND,
    model.COMMAND,
    recipes.COMMAND,
    train.PRETRAIN,
    train.FINETUNE,
    ask.COMMAND,
    chat.COMMAND,
    merge.COMMAND,
    convert.COMMAND,
    resize.COMMAND,
    export.COMMAND,
    launch.COMMAND,
    rehearse.COMMAND,
    checkpoint.COMMAND,
    serve.COMMAND,
    admin.COMMAND,
    model.FAMILIES,
    doctor.COMMAND,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that `argv` (default: sys.argv[1:]) names, and exit with its code."""
    parser = make_parser()
    parsed = parser.parse_args(argv)
    if parsed.version:
        print(format_versions())
        return
    if not hasattr(parsed, "command"):
        parser.print_help()
        sys.exit(2)
    exit_on_sigterm()
    exit_with(lambda: run_parsed(parsed))


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="oarlock",
        description="Train and serve large language models on PaddlePaddle.",
        epilog="Flags are written with dashes or with underscores: --max-shard-size, --max_shard_size.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the versions of Oarlock and its dependencies")
    add_commands(parser, COMMANDS)
    return parser
