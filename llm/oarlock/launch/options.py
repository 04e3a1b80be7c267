"""Declares the options of `oarlock launch`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from oarlock.config.options import at_least, between, option

_MOST = 999_999
_HOST_AND_PORT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*:[0-9]{1,5}")


def _is_host_and_port(value: str) -> str | None:
    return None if _HOST_AND_PORT.fullmatch(value) else "must be host:port"


@dataclass(frozen=True)
class LaunchOptions:
    """Options of `oarlock launch`: where the ranks run, and how often they are restarted."""

    device: str = option("gpu", choices=("gpu", "cpu"))
    """What the ranks run on."""
    gpus: str | None = option(None)
    """GPUs of this node: a list of at least two (0,1,2,3), or a number. On the CPU, the number of processes.
    Default: all GPUs that can be seen, or one process on the CPU."""
    nnodes: int = option(1, between(1, _MOST))
    """Number of nodes. Run the command once on each of them."""
    master: str | None = option(None, _is_host_and_port)
    """host:port of the first node, with a free port. Needed for several nodes."""
    node_rank: int | None = option(None, at_least(0))
    """Rank of this node: 0 on the master, then 1, 2, ... Needed for several nodes."""
    max_restart: int | None = option(None, between(0, _MOST))
    """Restart failed ranks up to this many times. They resume from the newest checkpoint."""
    log_dir: str = option("log")
    """Folder for the output of each rank (workerlog.0, ...). One process without a launcher writes to the console."""
    tp: int | None = option(None, between(1, _MOST), unit="ranks")
    """Tensor parallel degree. With this option, the degrees of the ranks are passed to the script."""
    pp: int = option(1, between(1, _MOST), unit="ranks")
    """Pipeline parallel degree. Used with --tp."""
    sharding_degree: int | None = option(None, between(1, _MOST), unit="ranks")
    """Sharding degree. Used with --tp. Default: 2 if tp x pp leaves an even number of ranks, else all
    ranks that are left."""
    sharding: str | None = option(None)
    """Sharding stage. Used with --tp. Default: stage2, or stage1 if a single rank is left."""
    dry_run: bool = option(False)
    """Print the command and exit."""
    slurm: bool = option(False)
    """Run SCRIPT with bash once on every node of this Slurm job, and requeue the job before its time limit. Takes no
    other option; scripts/launch.slurm uses it."""
    rehearsal: str | None = option(None)
    """Command that runs the same job on the CPU, for the error message when there is no GPU."""


def name_option(name: str) -> str:
    """Return both spellings of an option, for messages: the variable of the scripts, and the flag."""
    return f"{name.upper()} (--{name})"
