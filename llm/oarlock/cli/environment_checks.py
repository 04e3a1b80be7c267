"""The checks of `oarlock doctor`: whether this machine has what training needs, and what to fix if not."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from oarlock.environment import matmul_library
from oarlock.environment.cpu import count_available_cores
from oarlock.environment.paddle_import import import_paddle
from oarlock.errors import EnvironmentProblem

_TESTED_PYTHONS = ("3.10", "3.11", "3.12")
_TESTED = {"paddlenlp": "3.0.0b4", "paddlepaddle": "3.3.1", "paddlepaddle-gpu": "3.3.1"}
_LAUNCH_SECONDS = 180


@dataclass(frozen=True)
class Diagnosis:
    """A line of the report.

    Attributes:
        text: what was found.
        fix: what to do about it; empty if nothing is wrong.
        is_warning: whether training works without the fix.
    """

    text: str
    fix: str = ""
    is_warning: bool = False


Check = Callable[[], Iterator[Diagnosis]]
CHECKS: list[Check] = []  # in the order of the report


def _check(function: Check) -> Check:
    CHECKS.append(function)
    return function


@_check
def check_python() -> Iterator[Diagnosis]:
    version = platform.python_version()
    is_tested = version.rpartition(".")[0] in _TESTED_PYTHONS
    fix = "" if is_tested else f"only tested with Python {', '.join(_TESTED_PYTHONS[:-1])} and {_TESTED_PYTHONS[-1]}"
    yield Diagnosis(f"Python {version}, {count_available_cores()} core(s)", fix, is_warning=True)


@_check
def check_packages() -> Iterator[Diagnosis]:
    for name, tested in _TESTED.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        fix = "" if version == tested else f"tested with {tested}: pip install -c constraints.txt {name}"
        yield Diagnosis(f"{name} {version}", fix, is_warning=True)
    both = [name for name in ("paddlepaddle", "paddlepaddle-gpu") if _is_installed(name)]
    if len(both) == 2:
        yield Diagnosis(
            "paddlepaddle and paddlepaddle-gpu are both installed and overwrite each other's files",
            "pip uninstall paddlepaddle paddlepaddle-gpu, then bash scripts/setup.sh",
        )
    limits = {"numpy": (2,), "protobuf": (6,), "pyarrow": (22,), "pandas": (3,)}
    for name, limit in limits.items():
        if _is_installed(name) and tuple(map(int, re.findall(r"\d+", metadata.version(name)))) >= limit:
            wanted = ".".join(map(str, limit))
            fix = f"paddlenlp 3.0.0b4 breaks with it: pip install -c constraints.txt '{name}<{wanted}'"
            yield Diagnosis(f"{name} {metadata.version(name)}", fix)


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


@_check
def check_paddle() -> Iterator[Diagnosis]:
    try:
        import_paddle()
        import paddle

        kind = "GPU" if paddle.device.is_compiled_with_cuda() else "CPU"
        total = float(paddle.ones([64, 64]).matmul(paddle.ones([64, 64])).sum())
        fix = "" if total == 64**3 else f"a matrix product is {total} instead of {64**3}: reinstall paddle"
        yield Diagnosis(f"paddle {paddle.__version__} ({kind} build) imports and computes", fix)
    except EnvironmentProblem as error:
        yield Diagnosis("paddle", str(error))
        return
    except Exception as error:  # a broken install can raise anything
        yield Diagnosis(f"paddle does not import: {error!r}", "bash scripts/setup.sh")
        return
    try:
        import paddlenlp

        yield Diagnosis(f"paddlenlp {paddlenlp.__version__} imports")
    except Exception as error:
        yield Diagnosis(f"paddlenlp does not import: {error!r}", "pip install -c constraints.txt paddlenlp")


@_check
def check_matrix_products() -> Iterator[Diagnosis]:
    """Report which library computes matrix products on the CPU, and why."""
    try:
        best, found = matmul_library.choose_library(), matmul_library.find_library_in_use()
    except Exception:  # check_paddle reports it
        return
    if not found:
        return
    reason = (
        f"{matmul_library.VARIABLE}={best}"
        if matmul_library.read_requested_library()
        else f"{matmul_library.read_processor_vendor() or 'processor unknown'}"
    )
    text = f"matrix products on the CPU use {matmul_library.TITLES[found]} ({reason})"
    fix = (
        ""
        if found == best
        else f"{matmul_library.TITLES[best]} is faster here: {matmul_library.use_library(best) or 'restart'}"
    )
    yield Diagnosis(text, fix, is_warning=True)


@_check
def check_gpu() -> Iterator[Diagnosis]:
    report = ""
    if shutil.which("nvidia-smi") is not None:
        report = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60, check=False).stdout
    driver = re.search(r"Driver Version:\s*([\d.]+)", report)
    if driver is None:
        yield Diagnosis("no NVIDIA driver: training runs on the CPU")
        return
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", report)  # the highest that the driver supports
    versions = f"{driver.group(1)} (CUDA {cuda.group(1) if cuda else '?'})"
    import paddle

    if not paddle.device.is_compiled_with_cuda():
        fix = "bash scripts/setup.sh installs paddlepaddle-gpu for it"
        yield Diagnosis(f"NVIDIA driver {versions}, but paddle is a CPU build", fix)
        return
    count = paddle.device.cuda.device_count()
    names = ", ".join(sorted({paddle.device.cuda.get_device_name(i) for i in range(count)}))
    fix = "" if count else "paddle sees no GPU: check CUDA_VISIBLE_DEVICES and the wheel's CUDA version"
    yield Diagnosis(f"{count} GPU(s): {names or 'none'}; driver {versions}", fix)


@_check
def check_ops() -> Iterator[Diagnosis]:
    """Check that the fused ops are built for this Paddle and device, and agree with the reference."""
    from oarlock.ops import library
    from oarlock.ops.self_check import check_norms

    try:
        import paddle

        on_gpu = paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
        if reason := library.why_missing(on_gpu):
            fix = "optional: without them training uses slower versions"
            yield Diagnosis(reason, fix, is_warning=True)
            return
        check_norms()
        built = library.built_for()
        devices = "CPU and GPU" if built is not None and built["cuda"] else "CPU"
        yield Diagnosis(f"fused ops ({devices}) load and agree with the reference; PaddleNLP finds them as fused_ln")
    except EnvironmentProblem as error:
        yield Diagnosis("fused ops", str(error))
    except Exception as error:  # a broken library can raise anything
        yield Diagnosis(f"fused ops do not load: {error!r}", "rm -r build/custom_ops; python custom_ops/build.py")


@_check
def check_shared_memory() -> Iterator[Diagnosis]:
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Diagnosis("no /dev/shm", "data loader workers need it; in Docker: --shm-size=8g", is_warning=True)
        return
    free = shutil.disk_usage(path).free
    fix = "" if free >= 1 << 30 else "less than 1 GB: data loader workers may die; in Docker: --shm-size=8g"
    yield Diagnosis(f"/dev/shm: {free / 1e9:.1f} GB free", fix, is_warning=True)


@_check
def check_disk() -> Iterator[Diagnosis]:
    free = shutil.disk_usage(Path.cwd()).free
    fix = "" if free >= 5e9 else "less than 5 GB here: a 7B checkpoint with optimizer states takes about 100 GB"
    yield Diagnosis(f"disk: {free / 1e9:.1f} GB free in {Path.cwd()}", fix, is_warning=True)


_LAUNCHED = """
import paddle, paddle.distributed as dist
dist.init_parallel_env()
x = paddle.ones([4]) * (dist.get_rank() + 1)
dist.all_reduce(x)
assert x.tolist() == [3.0] * 4, x
print("launched", flush=True)
"""


def check_launch() -> Iterator[Diagnosis]:
    """Run an all_reduce in two processes of Paddle's launcher, on two GPUs if there are two."""
    import paddle

    on_gpu = paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() >= 2
    chosen = ["--gpus", "0,1"] if on_gpu else ["--nproc_per_node", "2"]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "launched.py"
        script.write_text(_LAUNCHED)
        command = [
            sys.executable,
            "-m",
            "paddle.distributed.launch",
            *chosen,
            "--log_dir",
            f"{folder}/log",
            str(script),
        ]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=_LAUNCH_SECONDS, check=False)
            passed, reason = result.returncode == 0, (result.stderr or result.stdout).strip().splitlines()[-1:]
        except subprocess.TimeoutExpired:
            passed, reason = False, [f"not finished after {_LAUNCH_SECONDS} s"]
    fix = (
        ""
        if passed
        else f"{' '.join(reason)}. Does the host name resolve (hostname -i)? Does a firewall block the ports?"
    )
    yield Diagnosis("python -m paddle.distributed.launch: two processes reduce a tensor", fix)
