"""`oarlock convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from oarlock.cli.flags import Command, flag
from oarlock.cli.weight_flags import WeightFlags
from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level
from oarlock.errors import ModelError
from oarlock.files import is_vacant


@dataclass(frozen=True, kw_only=True)
class ConvertFlags(WeightFlags):
    """From where to where."""

    to: str = flag(choices=("hf", "paddle"))
    """Layout of the result."""
    input: str = flag(metavar="DIR")
    """Model folder in either layout, or a hub name. The source layout is detected from its weights."""
    output: Path = flag(metavar="DIR")
    """Folder to write. It must not exist yet."""


def _run(options: ConvertFlags) -> int:
    if not is_vacant(options.output):
        raise ModelError(f"{options.output}: there is something already; give a folder that does not exist yet")
    import_paddle()
    set_paddlenlp_log_level("error")
    from oarlock.export.convert import ConvertOptions, Target, convert
    from oarlock.hub.model_names import local_folder

    allow_pickle = options.allow_pickle_weights
    source = local_folder(options.input, with_weights=True, allow_pickle=allow_pickle)
    settings = ConvertOptions(options.dtype, options.shard_bytes, options.proof, allow_pickle)
    convert(source, options.output, cast(Target, options.to), settings)
    return 0


COMMAND = Command(
    "convert",
    "Write a model in Hugging Face's or Paddle's layout, and prove that it equals its source.",
    ConvertFlags,
    _run,
)
