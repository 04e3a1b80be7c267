"""A job on several nodes with Slurm, for as long as it takes.

Shortly before the time limit the ranks save a checkpoint, the job goes back into the queue, and its next start resumes
from there.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from oarlock.errors import EXIT_FAILED, ConfigError, printable
from oarlock.launch.supervisor import TERMINATED, exit_code, handle_signals

_TASK = Path(__file__).with_name("slurm_task.py")


@dataclass(frozen=True)
class SlurmJob:
    """A job as Slurm's variables describe it.

    Attributes:
        restarts: how often it has been requeued.
        nodelist: its nodes in Slurm's short form (node[1-4]).
    """

    number: int
    nodes: int
    restarts: int
    nodelist: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> SlurmJob:
        """Read Slurm's variables.

        Raises:
            ConfigError: this is not a Slurm job, or a variable is not a number.
        """
        if not environment.get("SLURM_JOB_ID"):
            raise ConfigError("not in a Slurm job; start it with: sbatch scripts/launch.slurm")
        for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_RESTART_COUNT"):
            if not re.fullmatch(r"[0-9]{1,12}", environment.get(name) or "0"):
                raise ConfigError(f"{name} must be a number; got {environment[name]!r}")
        return cls(
            number=int(environment["SLURM_JOB_ID"]),
            nodes=int(environment.get("SLURM_JOB_NUM_NODES") or 1),
            restarts=int(environment.get("SLURM_RESTART_COUNT") or 0),
            nodelist=environment.get("SLURM_JOB_NODELIST", ""),
        )


class SlurmSupervisor:
    """Runs a script once on every node of a job, with srun.

    SIGUSR1 (the time limit is near) and SIGTERM (scancel) let the ranks save a checkpoint and end.
    """

    def __init__(self, job: SlurmJob) -> None:
        self._job = job
        self._stopped_by: signal.Signals | None = None

    def run(self, script: str, arguments: Sequence[str]) -> int:
        """Run the script with bash and return the exit code of the job.

        Raises:
            ConfigError: there is no such script, or Slurm does not say where the nodes are.
        """
        if not Path(script).is_file():
            raise ConfigError(f"there is no script {script} in {Path.cwd()}")
        job = self._job
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", job.nodelist], stdout=subprocess.PIPE, text=True, check=False
        )
        if hosts.returncode or not hosts.stdout.strip():
            raise ConfigError(f"scontrol can't list the nodes of this job ({job.nodelist})")
        # The port follows from the job's number, so that two jobs on a node don't collide. It lies below 32768, where
        # Linux and Paddle's launcher begin to take ports of their own.
        master = f"{hosts.stdout.split()[0]}:{20000 + job.number % 12000}"
        environment = os.environ | {"MASTER": master, "NNODES": str(job.nodes)}
        words = " ".join([script, *arguments])
        _log(f"job {job.number} on {job.nodes} node(s), master {master}, start {job.restarts + 1}: {words}")
        # cpu-bind=none: the ranks share the cores of the node; Slurm would bind the one task to one core.
        command = ["srun", "--kill-on-bad-exit=1", "--cpu-bind=none"]
        command += [sys.executable, str(_TASK), "bash", script, *arguments]
        with handle_signals(self._stop, signal.SIGUSR1, signal.SIGTERM):
            code = exit_code(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL).wait())
        return self._finish(code)

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self._stopped_by is None:
            self._stopped_by = signal.Signals(number)
            _log(f"{self._stopped_by.name}: the trainers save a checkpoint and stop")
            # srun itself must not get SIGTERM: it would kill the tasks at once. With --signal, scancel sends it to the
            # tasks alone.
            if _call("scancel", "--signal=TERM", str(self._job.number)):
                _log("scancel failed; the newest checkpoint is the last regular one")

    def _finish(self, code: int) -> int:
        """Requeue the job if it was stopped before its time limit."""
        # Stopped: the ranks saved and returned 0, or were still starting and the signal ended them (above 128). Any
        # other code is a failure, which would come back with the job.
        if self._stopped_by == signal.SIGUSR1 and (code == 0 or code > 128):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # requeueing ends this program
            _log(f"stopped before the time limit: requeueing job {self._job.number}")
            if _call("scontrol", "requeue", str(self._job.number)):
                _log("could not requeue; the same sbatch command resumes from the checkpoint")
                return EXIT_FAILED
            return 0
        if self._stopped_by == signal.SIGTERM:
            _log(f"cancelled (code {code}); the same sbatch command resumes from the newest checkpoint")
            return TERMINATED
        _log(f"ended with code {code}")
        return code


def _call(*command: str) -> int:
    try:
        return subprocess.run(command, check=False).returncode
    except OSError:
        return EXIT_FAILED


def _log(message: str) -> None:
    print(printable(f"slurm: {message}"), flush=True)
