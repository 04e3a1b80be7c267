"""The machine under a process: cores, threads, ranks, and quiet imports. Imports paddle only inside functions."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from oarlock import light_imports, products
from oarlock.errors import EnvironmentProblem, printable


def available_cores() -> int:
    """Cores this process may use: its CPU affinity, cut by the container's quota (cgroup v2 or v1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, min(cores, math.ceil(quota)) if quota else cores)


def _cgroup_quota(root: Path) -> float | None:
    """The container's CPU limit in cores, or None where there is none."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((root / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu/cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 else None
    return None


def cache_folder() -> Path:
    """Where made data is kept between runs: $XDG_CACHE_HOME/oarlock, by default ~/.cache/oarlock."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "oarlock"


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


def say(message: str) -> None:
    """One line on the console, from rank 0 only."""
    if is_first_rank():
        tqdm.write(printable(f"oarlock: {message}"), file=sys.stdout)  # leaves a progress bar whole
        sys.stdout.flush()


def progress_bar(total: int, desc: str, unit: str, **options: Any) -> tqdm:
    """A bar on rank 0; where there is no terminal, a line every 30 seconds. Work of a second or less shows none."""
    pace = {"delay": 1.0} if sys.stderr.isatty() else {"delay": 20.0, "mininterval": 30.0, "maxinterval": 60.0}
    return tqdm(total=total, desc=desc, unit=unit, disable=not is_first_rank(), **pace, **options)


_said: set[str] = set()


def say_once(message: str) -> None:
    """Like say(), but the same sentence is said only once in a process."""
    if message not in _said:
        _said.add(message)
        say(message)


def thread_share(requested: int | None = None) -> int:
    """Threads for this process on a CPU.

    --num_threads goes first, then OMP_NUM_THREADS, then an even share of the cores. Under Paddle's launcher
    OMP_NUM_THREADS=1 is not the user's word (importing paddle in the launcher sets it), so the share is taken.
    """
    if requested:
        return requested
    from_environment = os.environ.get("OMP_NUM_THREADS", "")
    launched = "PADDLE_LOCAL_SIZE" in os.environ
    if from_environment.isdigit() and (int(from_environment) > 1 or not launched):
        return int(from_environment)
    return max(1, available_cores() // local_world_size())


# Import-time and deprecation noise that no user can act on.
_NOISE = (
    r"[\s\S]*No ccache found",
    r"[\s\S]*Setuptools is replacing distutils",
    r"[\s\S]*pkg_resources is deprecated",
    r"[\s\S]*API \"paddle\.",
    r"Current global rank \d+ is not in group",  # every rank makes every group
    r"No shared comm will be constructed",
    r"nccl reduce_avg requires",
)
_threads: int | None = None


def import_paddle(num_threads: int | None = None) -> int:
    """Import paddle quietly, for the first time in this process, with its share of the cores and the library for matrix
    products that is best on this processor; later calls do nothing.

    paddlenlp, when it is imported after this, leaves out what training does not use (see oarlock.light_imports).

    Returns:
        The number of threads it got. (Plain paddle leaves one in use: importing it sets OMP_NUM_THREADS=1.)
    """
    global _threads
    if _threads is not None:
        return _threads
    _threads = thread_share(num_threads)
    best = products.best()
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    _silence()
    light_imports.install()
    os.environ.pop("OMP_NUM_THREADS", None)  # any other value than 1 makes paddle print advice; it is set below
    try:
        import paddle
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(
            f"{error.name} is not installed in this Python ({sys.executable}); `bash scripts/setup.sh` sets up .venv"
        ) from error

    _silence()  # paddle puts filters of its own in front
    os.environ["OMP_NUM_THREADS"] = str(_threads)  # for child processes and OpenMP code loaded later
    paddle.base.core.set_num_threads(_threads)
    products.use(best)
    return _threads


def _silence() -> None:
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=pattern)


_LIBC = ctypes.CDLL(None)  # opened here: a child of a process with threads, before its exec, may do next to nothing
_terminated = _deferring = False


def exit_on_sigterm() -> None:
    """Let SIGTERM end the program through its `finally` blocks (for commands that write files)."""
    signal.signal(signal.SIGTERM, _on_sigterm)


def note_sigterm() -> None:
    """For programs with a handler of their own: the next stop_if_terminated() ends them."""
    global _terminated
    _terminated = True


def _on_sigterm(*_: object) -> None:
    note_sigterm()
    if not _deferring:
        stop_if_terminated()


@contextlib.contextmanager
def deferred_sigterm() -> Iterator[None]:
    """In here SIGTERM takes effect at stop_if_terminated() alone, which has to be called often.

    What a signal handler raises is lost when it interrupts a fork hook or a destructor, and leaves locks taken when it
    interrupts a pool of processes.
    """
    global _deferring
    before, _deferring = _deferring, True
    try:
        yield
    finally:
        _deferring = before


def stop_if_terminated() -> None:
    """End the program if SIGTERM came (see deferred_sigterm)."""
    if _terminated:
        sys.exit(128 + signal.SIGTERM)


def die_with_parent() -> None:
    """Have the kernel end this process when its parent dies, SIGKILL included (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        _LIBC.prctl(pr_set_pdeathsig, signal.SIGKILL)


@contextlib.contextmanager
def start_up_left_uncollected() -> Iterator[None]:
    """Inside, Python's garbage collector leaves alone what is there now: half a million objects of imports and model.

    They are here to stay, and to look through them again and again takes 1% of a small model's steps.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Make and run tensors on the CPU in here; the device is as before afterwards."""
    import paddle

    device = paddle.device.get_device()
    paddle.set_device("cpu")
    try:
        yield
    finally:
        if device != "cpu":
            paddle.set_device(device)


def set_paddlenlp_log_level(level: str) -> None:
    """PaddleNLP's logger is chatty at its default; ours says what matters."""
    from paddlenlp.utils.log import logger

    logger.set_level(level.upper())
    logging.getLogger("paddle").setLevel(level.upper())
    from paddle.distributed.fleet.utils.log_util import set_log_level

    set_log_level(level.upper())
