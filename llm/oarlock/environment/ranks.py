"""The rank of this process, as the launcher set it in the environment."""

from __future__ import annotations

import os


def world_size() -> int:
    """Processes of this run, as the launcher says (1 without a launcher)."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def rank() -> int:
    """This process among them."""
    return int(os.environ.get("PADDLE_TRAINER_ID", "0"))


def local_world_size() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("PADDLE_LOCAL_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process speaks for all (log, progress, files written once)."""
    return rank() == 0
