"""`oarlock convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from oarlock.api.models import convert_model
from oarlock.cli.flags import Command, flag
from oarlock.cli.weight_flags import WeightFlags


@dataclass(frozen=True, kw_only=True)
class ConvertFlags(WeightFlags):
    """Options of `oarlock convert`."""

    to: str = flag(choices=("hf", "paddle"))
    """Layout of the result."""
    input: str = flag(metavar="DIR")
    """Model folder in either layout, or a hub name. The source layout is detected from its weights."""
    output: Path = flag(metavar="DIR")
    """Folder to write. It must not exist yet."""


def _run(options: ConvertFlags) -> int:
    convert_model(options.input, options.output, cast(Any, options.to), **options.to_arguments())
    return 0


COMMAND = Command(
    "convert",
    "Write a model in Hugging Face's or Paddle's layout, and prove that it equals its source.",
    ConvertFlags,
    _run,
)
