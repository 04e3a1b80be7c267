"""`oarlock merge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from oarlock.cli.flags import Command, flag
from oarlock.cli.weight_flags import WeightFlags
from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level


@dataclass(frozen=True, kw_only=True)
class MergeFlags(WeightFlags):
    """Which adapters are added to which base, and where the result goes."""

    model: str | None = flag(None, metavar="BASE")
    """Folder or hub name of the base. Default: where it was in training."""
    adapter: tuple[str, ...] = flag(metavar="DIR")
    """Adapter folder. Can be repeated."""
    weight: tuple[float, ...] = flag(())
    """Weight of each adapter, in their order. Can be repeated. Default: 1."""
    output: Path = flag(metavar="DIR")
    """Folder to write. It must not exist yet."""


def _run(options: MergeFlags) -> int:
    from oarlock.merge.inputs import AdapterMix, check_output

    mix = AdapterMix.open(options.adapter, options.weight)
    check_output(options.output)
    import_paddle()
    set_paddlenlp_log_level("error")
    from oarlock.hub.model_names import local_folder
    from oarlock.merge.merge import MergeOptions, merge
    from oarlock.peft.adapter_base import find_base

    allow_pickle = options.allow_pickle_weights
    if options.model:
        base = local_folder(options.model, with_weights=True, allow_pickle=allow_pickle)
    else:
        base = find_base(mix.parts[0].adapter, "Name it: --model BASE", allow_pickle=allow_pickle)
    settings = MergeOptions(options.dtype, options.shard_bytes, options.proof, allow_pickle)
    merge(base, mix, options.output, settings)
    return 0


COMMAND = Command(
    "merge", "Merge LoRA adapters into their base model, and prove that the result equals both.", MergeFlags, _run
)
