"""`oarlock launch`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from oarlock.cli.flags import Command, positional
from oarlock.launch.options import LAUNCH_SPECS, LaunchOptions, parse_launch_options
from oarlock.package_files import ENTRYPOINTS, entrypoint_script


@dataclass(frozen=True, kw_only=True)
class LaunchFlags(LaunchOptions):
    """The options of a launch, and the script to start."""

    script: str = positional(metavar="SCRIPT")
    """pretrain, finetune, or the path of a script with their options."""
    arguments: tuple[str, ...] = positional((), metavar="...", takes_rest=True)
    """Arguments of the script."""


def _run(options: LaunchFlags) -> int:
    from oarlock.launch.run import launch

    given = {
        item.name: getattr(options, item.name)
        for item in fields(options)
        if item.name in LAUNCH_SPECS and getattr(options, item.name) != item.default
    }
    script = str(entrypoint_script(options.script)) if options.script in ENTRYPOINTS else options.script
    return launch(parse_launch_options(given), script, list(options.arguments))


COMMAND = Command(
    "launch",
    "Start the ranks of a training script, pass signals on, and restart failed ranks.",
    LaunchFlags,
    _run,
)
