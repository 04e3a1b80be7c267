"""Importing Paddle without noise, and with the right number of threads. This module itself does not import Paddle."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from oarlock.compat import lazy_imports
from oarlock.environment import matmul_library
from oarlock.environment.cpu import choose_num_threads
from oarlock.errors import EnvironmentProblem

# Import-time and deprecation warnings that users can do nothing about.
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
    """Import paddle with its share of the cores and the fastest matrix multiplication library of this processor.

    Only the first call of a process does so. If paddlenlp is imported later, parts that training does not use are left
    out until they are used (oarlock.compat.lazy_imports).

    Returns:
        The number of threads. (`import paddle` alone leaves one, because it sets OMP_NUM_THREADS=1.)
    """
    global _threads
    if _threads is not None:
        return _threads
    _threads = choose_num_threads(num_threads)
    library = matmul_library.choose_library()
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    _silence()
    lazy_imports.install()
    os.environ.pop("OMP_NUM_THREADS", None)  # values other than 1 make paddle print advice; it is set again below
    try:
        import paddle
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(
            f"{error.name} is not installed in this Python ({sys.executable}); `bash scripts/setup.sh` sets up .venv"
        ) from error

    _silence()  # again, because paddle inserts filters in front
    os.environ["OMP_NUM_THREADS"] = str(_threads)  # for child processes and OpenMP code loaded later
    paddle.base.core.set_num_threads(_threads)
    matmul_library.use_library(library)
    return _threads


def _silence() -> None:
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=pattern)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Use the CPU within this block, whatever the device is."""
    import paddle

    device = paddle.device.get_device()
    paddle.set_device("cpu")
    try:
        yield
    finally:
        if device != "cpu":
            paddle.set_device(device)


def set_paddlenlp_log_level(level: str) -> None:
    """Set the level of PaddleNLP's and Paddle's loggers, which log too much by default."""
    from paddlenlp.utils.log import logger

    logger.set_level(level.upper())
    logging.getLogger("paddle").setLevel(level.upper())
    from paddle.distributed.fleet.utils.log_util import set_log_level

    set_log_level(level.upper())
