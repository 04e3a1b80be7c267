"""`oarlock convert`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oarlock.cli.weights import add_weight_flags
from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level
from oarlock.errors import ModelError
from oarlock.files import is_vacant

Adder = Callable[..., argparse.ArgumentParser]


def add_convert(commands: Any, command: Adder) -> None:
    """The convert subcommand."""
    convert = command(
        commands, "convert", "Write a model in Hugging Face's or Paddle's layout, proven equal to its source.", _convert
    )
    convert.add_argument("--to", choices=("hf", "paddle"), required=True, help="layout of the result")
    convert.add_argument("--input", metavar="DIR", required=True, help="model folder in either layout, or a hub name")
    convert.add_argument("--output", metavar="DIR", required=True, help="folder that does not exist yet")
    add_weight_flags(convert, "the source")


def _convert(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output)
    if not is_vacant(output):
        raise ModelError(f"{output}: there is something already; give a folder that does not exist yet")
    import_paddle()
    set_paddlenlp_log_level("error")
    from oarlock.export.convert import ConvertOptions, convert
    from oarlock.hub.model_names import local_folder

    allow_pickle = arguments.allow_pickle_weights
    source = local_folder(arguments.input, with_weights=True, allow_pickle=allow_pickle)
    size = arguments.shard_bytes
    convert(source, output, arguments.to, ConvertOptions(arguments.dtype, size, not arguments.no_proof, allow_pickle))
    return 0
