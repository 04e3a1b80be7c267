"""`oarlock launch`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from oarlock.cli.flags import Command, config_flag, positional
from oarlock.launch.options import LAUNCH_SPECS, LaunchOptions, parse_launch_options


@dataclass(frozen=True, kw_only=True)
class LaunchCommandOptions:
    """The options of a launch, and the script to start."""

    device: str = config_flag(LaunchOptions, "device")
    gpus: str | None = config_flag(LaunchOptions, "gpus")
    nnodes: int = config_flag(LaunchOptions, "nnodes")
    master: str | None = config_flag(LaunchOptions, "master")
    node_rank: int | None = config_flag(LaunchOptions, "node_rank")
    max_restart: int | None = config_flag(LaunchOptions, "max_restart")
    log_dir: str = config_flag(LaunchOptions, "log_dir")
    tp: int | None = config_flag(LaunchOptions, "tp")
    pp: int = config_flag(LaunchOptions, "pp")
    sharding_degree: int | None = config_flag(LaunchOptions, "sharding_degree")
    sharding: str | None = config_flag(LaunchOptions, "sharding")
    dry_run: bool = config_flag(LaunchOptions, "dry_run")
    slurm: bool = config_flag(LaunchOptions, "slurm")
    rehearsal: str | None = config_flag(LaunchOptions, "rehearsal")
    script: str = positional(metavar="SCRIPT")
    """run_pretrain.py, finetune_generation.py, or a script with their options."""
    arguments: tuple[str, ...] = positional((), metavar="...", takes_rest=True)
    """Arguments of the script."""


def _run(options: LaunchCommandOptions) -> int:
    from oarlock.launch.run import launch

    given = {
        item.name: getattr(options, item.name)
        for item in fields(options)
        if item.name in LAUNCH_SPECS and getattr(options, item.name) != item.default
    }
    return launch(parse_launch_options(given), options.script, list(options.arguments))


COMMAND = Command(
    "launch",
    "Start the ranks of a training script, pass signals on, and restart failed ranks.",
    LaunchCommandOptions,
    _run,
)
