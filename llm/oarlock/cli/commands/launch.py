"""`oarlock launch`."""

from __future__ import annotations

from dataclasses import dataclass

from oarlock.cli.flags import Command, positional
from oarlock.config.recipes import find_recipe
from oarlock.launch.options import LaunchOptions
from oarlock.package_files import ENTRYPOINTS, find_entrypoint


@dataclass(frozen=True, kw_only=True)
class LaunchFlags(LaunchOptions):
    """Options of `oarlock launch`, and the script to start."""

    script: str = positional(metavar="SCRIPT")
    """pretrain, finetune, or the path of a script with their options."""
    arguments: tuple[str, ...] = positional((), metavar="...", takes_rest=True)
    """Arguments of the script."""


def _run(options: LaunchFlags) -> int:
    from oarlock.launch.run import launch

    script, arguments = options.script, options.arguments
    if script in ENTRYPOINTS:
        script = str(find_entrypoint(script))
        if arguments and not arguments[0].startswith("-"):
            find_recipe(arguments[0])  # a wrong name is an error here, before ranks start
    return launch(options, script, arguments)


COMMAND = Command(
    "launch", "Start the ranks of a training script, pass signals on, and restart failed ranks.", LaunchFlags, _run
)
