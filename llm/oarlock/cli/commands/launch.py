"""`oarlock launch`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from oarlock.cli.flags import ConfigCommand
from oarlock.launch.options import LAUNCH_SPECS, parse_launch_options

_HELP = "Start the ranks of a training script, pass signals on, and restart failed ranks."


def _make_parser() -> argparse.ArgumentParser:
    """The flags of LaunchOptions, read as text: parse_launch_options reports all problems at once."""
    parser = argparse.ArgumentParser("oarlock launch", description=_HELP, allow_abbrev=False)
    for name, spec in LAUNCH_SPECS.items():
        metavar = "|".join(spec.choices) or ("N" if spec.type is int else "TEXT")
        form: dict[str, Any] = {"action": "store_const", "const": True} if spec.type is bool else {"metavar": metavar}
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, help=spec.help, default=argparse.SUPPRESS, **form)
    parser.add_argument("script", help="run_pretrain.py, finetune_generation.py or a script with their options")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    return parser


def _run(words: Sequence[str]) -> int:
    from oarlock.launch.run import launch

    parsed = vars(_make_parser().parse_args(words))
    values = {name: value for name, value in parsed.items() if name in LAUNCH_SPECS}
    return launch(parse_launch_options(values), parsed["script"], parsed["arguments"])


COMMAND = ConfigCommand("launch", _HELP, _run)
