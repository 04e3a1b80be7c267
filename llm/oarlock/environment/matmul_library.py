"""Which library multiplies float32 matrices on a CPU: the MKL or the oneDNN, both of which lie in Paddle's wheel.

Paddle asks MKL, whose version of 2019 runs its slowest code on processors that are not Intel's. There oarlock_gemm.so
(custom_ops/common/onednn_gemm.cc) is put before it, and Paddle's own products and those of the fused operators are
oneDNN's. Both give the same bits every time, but not the same as one another: a run records its library, and a resumed
one keeps it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from oarlock.errors import EnvironmentProblem

MKL, ONEDNN = "mkl", "onednn"
TITLES = {MKL: "MKL", ONEDNN: "oneDNN"}
VARIABLE = "OARLOCK_GEMM"
LIBRARY = Path(__file__).resolve().parents[1] / "ops" / "oarlock_gemm.so"
_HANDLE = "_ZN3phi7dynload16mklml_dso_handleE"  # of the library in which Paddle looks for products, by their names

_gemm: ctypes.CDLL | None = None


def asked_for() -> str:
    """What the environment's OARLOCK_GEMM says, "" where it says nothing.

    Raises:
        EnvironmentProblem: when it is neither of the two.
    """
    value = os.environ.get(VARIABLE, "").strip().lower()
    if value not in ("", *TITLES):
        raise EnvironmentProblem(f"{VARIABLE}={value}: has to be {MKL} or {ONEDNN}, or left out")
    return value


@functools.cache
def processor() -> str:
    """Its maker, as CPUID has it (GenuineIntel, AuthenticAMD, ...); "" where Linux does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def best() -> str:
    """The library for this processor; OARLOCK_GEMM goes first."""
    return asked_for() or (MKL if processor() in ("", "GenuineIntel") else ONEDNN)


def use(library: str) -> str:
    """Multiply by it from now on. Call it before the first product of the process: Paddle looks for its library once.

    Returns:
        Why it can't be done; "" when it was. MKL is then used, as Paddle does by itself.
    """
    global _gemm
    if _gemm is None:
        if library == MKL:
            return ""
        if not LIBRARY.exists():
            return f"{LIBRARY.name} is not built (`bash scripts/setup.sh` builds it, with g++)"
        try:
            _gemm = _put_before_mkl()
        except (OSError, ValueError, AttributeError) as error:
            return f"{LIBRARY.name} does not load with this Paddle: {error}"
    _gemm.oarlock_multiply_by_mkl(library == MKL)
    return ""


def _put_before_mkl() -> ctypes.CDLL:
    """In Paddle 3.3.1, which has loaded MKL when it was told its number of threads."""
    import paddle

    core = ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libphi_core.so"))
    handle = ctypes.c_void_p.in_dll(core, _HANDLE)
    if not handle.value:
        paddle.base.core.set_num_threads(paddle.base.core.get_num_threads())
    gemm = ctypes.CDLL(str(LIBRARY))
    gemm.oarlock_num_products.restype = ctypes.c_int64
    handle.value = gemm._handle
    return gemm


def in_use() -> str:
    """The library that Paddle multiplies by, as a product shows; "" where it is neither (on a GPU, or without MKL).

    It is MKL, whatever use() was told, where Paddle had multiplied before.
    """
    import paddle

    if (
        paddle.device.get_device() != "cpu"
        or not (Path(paddle.__file__).parent / "libs" / "libmklml_intel.so").exists()
    ):
        return ""
    if _gemm is None:
        return MKL
    before = _gemm.oarlock_num_products()
    ones = paddle.ones([8, 8], "float32")
    paddle.matmul(ones, ones)
    passed = _gemm.oarlock_num_products() > before
    return ONEDNN if passed and not _gemm.oarlock_multiplies_by_mkl() else MKL
