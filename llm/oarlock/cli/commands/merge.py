"""`oarlock merge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from oarlock.api.models import merge_adapters
from oarlock.cli.flags import Command, flag
from oarlock.cli.weight_flags import WeightFlags


@dataclass(frozen=True, kw_only=True)
class MergeFlags(WeightFlags):
    """Options of `oarlock merge`."""

    model: str | None = flag(None, metavar="BASE")
    """Folder or hub name of the base. Default: where it was in training."""
    adapter: tuple[str, ...] = flag(metavar="DIR")
    """Adapter folder. Can be repeated."""
    weight: tuple[float, ...] = flag(())
    """Weight of each adapter, in their order. Can be repeated. Default: 1."""
    output: Path = flag(metavar="DIR")
    """Folder to write. It must not exist yet."""


def _run(options: MergeFlags) -> int:
    merge_adapters(
        options.adapter,
        options.output,
        model=options.model,
        weights=options.weight,
        **options.to_arguments(),
    )
    return 0


COMMAND = Command(
    "merge", "Merge LoRA adapters into their base model, and prove that the result equals both.", MergeFlags, _run
)
