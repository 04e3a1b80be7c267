"""CPU cores and threads of this process."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

from oarlock.environment.ranks import local_world_size


def count_available_cores() -> int:
    """Cores that this process may use: its CPU affinity, limited by the container's quota (cgroup v2 or v1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, min(cores, math.ceil(quota)) if quota else cores)


def _cgroup_quota(root: Path) -> float | None:
    """The container's CPU limit in cores, or None."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((root / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu/cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 else None
    return None


def choose_num_threads(requested: int | None = None) -> int:
    """The number of CPU threads for this process: --num_threads, OMP_NUM_THREADS, or an even share of the cores.

    Under Paddle's launcher OMP_NUM_THREADS=1 is ignored: importing paddle in the launcher sets it, not the user.
    """
    if requested:
        return requested
    from_environment = os.environ.get("OMP_NUM_THREADS", "")
    launched = "PADDLE_LOCAL_SIZE" in os.environ
    if from_environment.isdigit() and (int(from_environment) > 1 or not launched):
        return int(from_environment)
    return max(1, count_available_cores() // local_world_size())
