"""A supervisor of `oarlock launch` in a process of its own: python supervise.py launcher|alone WORDS... (3 restarts)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "llm"))

from oarlock.launch.command import LaunchCommand
from oarlock.launch.supervisor import Supervisor

if __name__ == "__main__":
    words = [sys.executable, *sys.argv[2:]]
    command = LaunchCommand(words, has_launcher=sys.argv[1] == "launcher", log_dir="logs", num_ranks=2, degrees=None)
    sys.exit(Supervisor(command, os.environ, max_restart=3).run())
