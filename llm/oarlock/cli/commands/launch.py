"""`oarlock launch`."""

from __future__ import annotations

from dataclasses import dataclass

from oarlock.cli.flags import Command, positional
from oarlock.launch.options import LaunchOptions


@dataclass(frozen=True, kw_only=True)
class LaunchCommandOptions(LaunchOptions):
    """The options of a launch, and the script to start."""

    script: str = positional(metavar="SCRIPT")
    """run_pretrain.py, finetune_generation.py, or a script with their options."""
    arguments: tuple[str, ...] = positional((), metavar="...", takes_rest=True)
    """Arguments of the script."""


def _run(options: LaunchCommandOptions) -> int:
    from oarlock.launch.run import launch

    return launch(options, options.script, options.arguments)


COMMAND = Command(
    "launch",
    "Start the ranks of a training script, pass signals on, and restart failed ranks.",
    LaunchCommandOptions,
    _run,
)
