"""`oarlock launch`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from oarlock.launch.options import LAUNCH_SPECS, parse_launch_options

Adder = Callable[..., argparse.ArgumentParser]


def add_launch(commands: Any, command: Adder) -> None:
    """The launch subcommand."""
    launch = command(
        commands, "launch", "Start the ranks of a training script, pass signals on, and restart failed ranks.", _launch
    )
    for name, spec in LAUNCH_SPECS.items():
        metavar = "|".join(spec.choices) or ("N" if spec.type is int else "TEXT")
        action = {"action": "store_const", "const": True} if spec.type is bool else {"metavar": metavar}
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        launch.add_argument(*spellings, help=spec.help, default=argparse.SUPPRESS, **action)
    launch.add_argument("script", help="run_pretrain.py, finetune_generation.py or a script with their options")
    launch.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")


def _launch(arguments: argparse.Namespace) -> int:
    from oarlock.launch.run import launch

    values = {name: value for name, value in vars(arguments).items() if name in LAUNCH_SPECS}
    return launch(parse_launch_options(values), arguments.script, arguments.arguments)
