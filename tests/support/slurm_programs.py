"""Stand-ins for the Slurm programs that `oarlock launch --slurm` calls; the name this file is run by selects one.

They write down in $SLURM_RECORD how they were called. srun runs one task per node on this machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

RECORD = Path(os.environ["SLURM_RECORD"])


def srun(words: list[str]) -> int:
    """Run the command once per node, and return the exit code of a failed task."""
    signal.signal(signal.SIGTERM, lambda *_: (RECORD / "srun-got-SIGTERM").touch())
    command = [word for i, word in enumerate(words) if any(not before.startswith("--") for before in words[: i + 1])]
    tasks = []
    for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
        own = {"SLURM_NODEID": str(node), "SLURM_GPUS_ON_NODE": "8"}
        tasks.append(subprocess.Popen(command, env=os.environ | own))
    (RECORD / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    codes = [task.wait() for task in tasks]
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def scontrol(words: list[str]) -> int:
    """show hostnames, show job, requeue."""
    if words[:2] == ["show", "hostnames"]:
        print("\n".join(f"node{i + 1}" for i in range(int(os.environ["SLURM_JOB_NUM_NODES"]))))
    elif words[:2] == ["show", "job"]:
        print(f"JobId={words[2]} JobName=oarlock\n   Command={os.environ['SUBMITTED']} --some flag\n   WorkDir=/")
    return 0


def scancel(words: list[str]) -> int:
    """Send SIGTERM to the tasks."""
    for pid in (RECORD / "tasks").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    return 0


if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    with (RECORD / name).open("a") as file:
        file.write(" ".join(sys.argv[1:]) + "\n")
    sys.exit({"srun": srun, "scontrol": scontrol, "scancel": scancel}[name](sys.argv[1:]))
