"""What `oarlock launch` does: build the command, then print it or run it."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence

from oarlock.errors import ConfigError
from oarlock.launch.command import build_command, make_environment
from oarlock.launch.options import LaunchOptions
from oarlock.launch.slurm import SlurmJob, SlurmSupervisor
from oarlock.launch.supervisor import Supervisor, log


def launch(options: LaunchOptions, script: str, arguments: Sequence[str]) -> int:
    """Start the ranks of this node and wait for them, or run a script on every node of a Slurm job.

    Args:
        script: path of a training script (run_pretrain.py, finetune_generation.py); with --slurm, of a bash script.
        arguments: its arguments.

    Returns:
        The exit code.

    Raises:
        ConfigError: the options are wrong, or don't fit this machine.
    """
    if options.slurm:
        given = {item.name: getattr(options, item.name) for item in dataclasses.fields(LaunchOptions)}
        if LaunchOptions(**given) != LaunchOptions(slurm=True):
            raise ConfigError("--slurm takes no other option; the script reads them from its environment")
        return SlurmSupervisor(SlurmJob.from_environment(os.environ)).run(script, arguments)
    command = build_command(options, script, arguments)
    if command.degrees:
        log(f"{command.num_ranks} ranks: {command.degrees}")
    if options.dry_run:
        # As bytes: a path may hold bytes that are no text.
        sys.stdout.buffer.write(os.fsencode(shlex.join(command.argv)) + b"\n")
        return 0
    with make_environment(options, command) as environment:
        return Supervisor(command, environment, options.max_restart or 0).run()
