"""`oarlock resize`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oarlock.cli.weights import add_shard_flag, positive
from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level
from oarlock.errors import ModelError
from oarlock.files import is_vacant

Adder = Callable[..., argparse.ArgumentParser]


def add_resize(commands: Any, command: Adder) -> None:
    """The resize subcommand."""
    resize = command(commands, "resize", "Grow a model's embedding for a tokenizer with added tokens.", _resize)
    resize.add_argument("--input", metavar="DIR", required=True, help="model folder in either layout, or a hub name")
    resize.add_argument("--tokenizer", metavar="DIR", required=True, help="tokenizer folder or hub name")
    resize.add_argument("--output", metavar="DIR", required=True, help="folder that does not exist yet")
    resize.add_argument(
        "--multiple-of", type=positive, default=64, metavar="N", help="round the rows up to a multiple (default: 64)"
    )
    add_shard_flag(resize)
    resize.add_argument(
        "--allow-pickle-weights", action="store_true", help="read pytorch_model.bin or *.pdparams where need be"
    )


def _resize(arguments: argparse.Namespace) -> int:
    output, allow_pickle = Path(arguments.output), arguments.allow_pickle_weights
    if not is_vacant(output):
        raise ModelError(f"{output}: there is something already; give a folder that does not exist yet")
    import_paddle()
    set_paddlenlp_log_level("error")
    from oarlock.hub.model_names import local_folder
    from oarlock.models.resize import resize_embedding

    model = local_folder(arguments.input, with_weights=True, allow_pickle=allow_pickle)
    resize_embedding(model, arguments.tokenizer, output, arguments.multiple_of, arguments.shard_bytes, allow_pickle)
    return 0
