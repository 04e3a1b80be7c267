"""Run the launch scripts as a user would, and parse the commands that they print."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

SCRIPTS = ROOT / "scripts"


def run_script(script: str | Path, folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a launch script in a folder, with these variables alone. No GPU can be seen."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *words], cwd=folder, env=environment | variables, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def parse_printed_command(script: str | Path, folder: Path, *words: str, **variables: str) -> list[str]:
    """The arguments of the command that a dry run prints, on a machine with GPUs 0 to 7."""
    variables = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "DRY_RUN": "1", **variables}
    result = run_script(script, folder, *words, **variables)
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def parse_flags(words: list[str]) -> dict[str, str]:
    """--name value pairs; a flag without a value has ""."""
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            found[name] = ""
        else:
            found[name] = word
    return found
