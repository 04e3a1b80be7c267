"""The library that multiplies float32 matrices on a CPU: MKL or oneDNN. Paddle's wheel contains both.

Paddle calls MKL, whose version of 2019 runs its slowest code on processors that are not Intel's. On these,
oarlock_gemm.so (custom_ops/common/onednn_gemm.cc) is loaded in front of it, and Paddle and the fused operators multiply
with oneDNN. Each library gives the same bits every time, but the two differ in the last bits. So a run records its
library, and a resumed run keeps it.
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
_HANDLE = "_ZN3phi7dynload16mklml_dso_handleE"  # of the library in which Paddle looks matrix products up by name

_gemm: ctypes.CDLL | None = None


def read_requested_library() -> str:
    """The library that the variable OARLOCK_GEMM requests, or "".

    Raises:
        EnvironmentProblem: the variable names another library.
    """
    value = os.environ.get(VARIABLE, "").strip().lower()
    if value not in ("", *TITLES):
        raise EnvironmentProblem(f"{VARIABLE}={value}: must be {MKL} or {ONEDNN}, or unset")
    return value


@functools.cache
def read_processor_vendor() -> str:
    """The processor's vendor as in CPUID (GenuineIntel, AuthenticAMD, ...), or "" if Linux does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def choose_library() -> str:
    """The requested library, or the faster one on this processor."""
    return read_requested_library() or (MKL if read_processor_vendor() in ("", "GenuineIntel") else ONEDNN)


def use_library(library: str) -> str:
    """Multiply with a library from now on. Call this before the process's first matrix product: Paddle looks up its
    library only once.

    Returns:
        Why this is impossible, or "". If it is, Paddle multiplies with MKL.
    """
    global _gemm
    if _gemm is None:
        if library == MKL:
            return ""
        if not LIBRARY.exists():
            return f"{LIBRARY.name} is not built (`bash scripts/setup.sh` builds it, with g++)"
        try:
            import paddle

            # Paddle is pointed to oarlock_gemm.so. Paddle 3.3.1 loads MKL when its number of threads is set.
            core = ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libphi_core.so"))
            handle = ctypes.c_void_p.in_dll(core, _HANDLE)
            if not handle.value:
                paddle.base.core.set_num_threads(core.omp_get_max_threads())  # as many as before
            gemm = ctypes.CDLL(str(LIBRARY))
            gemm.oarlock_num_products.restype = ctypes.c_int64
            handle.value = gemm._handle
            _gemm = gemm
        except (OSError, ValueError, AttributeError) as error:
            return f"{LIBRARY.name} can't be loaded with this Paddle: {error}"
    _gemm.oarlock_multiply_by_mkl(library == MKL)
    return ""


def find_library_in_use() -> str:
    """The library with which Paddle multiplies, found by matrix products; "" for neither (GPU, or Paddle without MKL).

    It is MKL, whatever was requested, if Paddle had multiplied before. Paddle looks up 2-D and batched products
    separately, and the fused operators look up theirs. So use_library(MKL) is needed then for all of them to agree.
    """
    import paddle

    if (
        paddle.device.get_device() != "cpu"
        or not (Path(paddle.__file__).parent / "libs" / "libmklml_intel.so").exists()
    ):
        return ""
    if _gemm is None:
        return MKL
    for shape in ([8, 8], [4, 8, 8]):
        before = _gemm.oarlock_num_products()
        ones = paddle.ones(shape, "float32")
        paddle.matmul(ones, ones)
        if _gemm.oarlock_num_products() == before:
            return MKL
    return MKL if _gemm.oarlock_multiplies_by_mkl() else ONEDNN
