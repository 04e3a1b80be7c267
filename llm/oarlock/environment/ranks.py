"""The rank of this process, as the launcher set it in the environment."""

from __future__ import annotations

import os


def world_size() -> int:
    """The number of processes of this run; 1 without a launcher."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def rank() -> int:
    """The rank of this process."""
    return int(os.environ.get("PADDLE_TRAINER_ID", "0"))


def local_world_size() -> int:
    """The number of processes of this run on this machine."""
    return int(os.environ.get("PADDLE_LOCAL_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this is the process that logs, shows progress and writes the files of which there is one."""
    return rank() == 0
