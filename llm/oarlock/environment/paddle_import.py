"""Importing Paddle quietly, with the right number of threads. Paddle is imported inside the functions only."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from oarlock.compat import lazy_imports
from oarlock.environment import matmul_library
from oarlock.environment.cpu import thread_share
from oarlock.errors import EnvironmentProblem

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

    paddlenlp, when it is imported after this, leaves out what training does not use (see oarlock.compat.lazy_imports).

    Returns:
        The number of threads it got. (Plain paddle leaves one in use: importing it sets OMP_NUM_THREADS=1.)
    """
    global _threads
    if _threads is not None:
        return _threads
    _threads = thread_share(num_threads)
    best = matmul_library.best()
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    _silence()
    lazy_imports.install()
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
    matmul_library.use(best)
    return _threads


def _silence() -> None:
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=pattern)


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
