"""`oarlock doctor`: does this machine have what training needs, and what to fix where it has not."""

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

from oarlock.cli.flags import Command, flag
from oarlock.environment import matmul_library
from oarlock.environment.cpu import available_cores
from oarlock.environment.paddle_import import import_paddle
from oarlock.errors import EnvironmentProblem

_TESTED_PYTHONS = ("3.10", "3.11", "3.12")
_TESTED = {"paddlenlp": "3.0.0b4", "paddlepaddle": "3.3.1", "paddlepaddle-gpu": "3.3.1"}
_LAUNCH_SECONDS = 180


@dataclass(frozen=True)
class Finding:
    """One line of the report. `fix` is empty when all is well."""

    text: str
    fix: str = ""
    warning: bool = False


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """What to check."""

    launch: bool = flag(True)
    """Skip the launch of two processes (10 to 20 seconds)."""


def _run(options: DoctorOptions) -> int:
    """Print the report; 0 if nothing has to be fixed."""
    failed = 0
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _packages,
        _paddle,
        _products,
        _gpu,
        _ops,
        _shared_memory,
        _disk,
    ]
    if options.launch:
        checks.append(_launch)
    for check in checks:
        for finding in check():
            mark = "ok  " if not finding.fix else ("note" if finding.warning else "FIX ")
            failed += bool(finding.fix) and not finding.warning
            print(f"{mark}  {finding.text}" + (f"\n      -> {finding.fix}" if finding.fix else ""), flush=True)
    print("no problems found" if not failed else f"{failed} problem(s) to fix")
    return 1 if failed else 0


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    is_tested = version.rpartition(".")[0] in _TESTED_PYTHONS
    fix = "" if is_tested else f"tested are Python {', '.join(_TESTED_PYTHONS[:-1])} and {_TESTED_PYTHONS[-1]}"
    yield Finding(f"Python {version}, {available_cores()} core(s)", fix, warning=True)


def _packages() -> Iterator[Finding]:
    for name, tested in _TESTED.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        fix = "" if version == tested else f"tested with {tested}: pip install -c constraints.txt {name}"
        yield Finding(f"{name} {version}", fix, warning=True)
    both = [name for name in ("paddlepaddle", "paddlepaddle-gpu") if _installed(name)]
    if len(both) == 2:
        yield Finding(
            "paddlepaddle and paddlepaddle-gpu are both installed and overwrite each other's files",
            "pip uninstall paddlepaddle paddlepaddle-gpu, then bash scripts/setup.sh",
        )
    limits = {"numpy": (2,), "protobuf": (6,), "pyarrow": (22,), "pandas": (3,)}
    for name, limit in limits.items():
        if _installed(name) and _numbers(metadata.version(name)) >= limit:
            wanted = ".".join(map(str, limit))
            fix = f"paddlenlp 3.0.0b4 breaks with it: pip install -c constraints.txt '{name}<{wanted}'"
            yield Finding(f"{name} {metadata.version(name)}", fix)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def _paddle() -> Iterator[Finding]:
    try:
        import_paddle()
        import paddle

        kind = "GPU" if paddle.device.is_compiled_with_cuda() else "CPU"
        total = float(paddle.ones([64, 64]).matmul(paddle.ones([64, 64])).sum())
        fix = "" if total == 64**3 else f"a matrix product gave {total}, expected {64**3}: reinstall paddle"
        yield Finding(f"paddle {paddle.__version__} ({kind} build) imports and computes", fix)
    except EnvironmentProblem as error:
        yield Finding("paddle", str(error))
        return
    except Exception as error:  # whatever a broken install raises is the finding
        yield Finding(f"paddle does not import: {error!r}", "bash scripts/setup.sh")
        return
    try:
        import paddlenlp

        yield Finding(f"paddlenlp {paddlenlp.__version__} imports")
    except Exception as error:
        yield Finding(f"paddlenlp does not import: {error!r}", "pip install -c constraints.txt paddlenlp")


def _products() -> Iterator[Finding]:
    """Which library multiplies on the CPU, and why."""
    try:
        best, found = matmul_library.best(), matmul_library.in_use()
    except Exception:  # _paddle has said what does not import
        return
    if not found:
        return
    reason = (
        f"{matmul_library.VARIABLE}={best}"
        if matmul_library.asked_for()
        else f"{matmul_library.processor() or 'processor unknown'}"
    )
    text = f"matrix products on the CPU by {matmul_library.TITLES[found]} ({reason})"
    fix = (
        ""
        if found == best
        else f"{matmul_library.TITLES[best]} is faster here: {matmul_library.use(best) or 'start anew'}"
    )
    yield Finding(text, fix, warning=True)


def _gpu() -> Iterator[Finding]:
    driver = nvidia_driver()
    if driver is None:
        yield Finding("no NVIDIA driver: training runs on the CPU")
        return
    import paddle

    if not paddle.device.is_compiled_with_cuda():
        fix = "bash scripts/setup.sh installs paddlepaddle-gpu for it"
        yield Finding(f"NVIDIA driver {driver[0]} (CUDA {driver[1]}), but paddle is a CPU build", fix)
        return
    count = paddle.device.cuda.device_count()
    names = ", ".join(sorted({paddle.device.cuda.get_device_name(i) for i in range(count)}))
    fix = "" if count else "paddle sees no GPU: check CUDA_VISIBLE_DEVICES and the wheel's CUDA version"
    yield Finding(f"{count} GPU(s): {names or 'none'}; driver {driver[0]} (CUDA {driver[1]})", fix)


def nvidia_driver() -> tuple[str, str] | None:
    """(driver version, highest CUDA version) that nvidia-smi reports, None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    result = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60, check=False)
    driver = re.search(r"Driver Version:\s*([\d.]+)", result.stdout)
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", result.stdout)
    return (driver.group(1), cuda.group(1) if cuda else "?") if driver else None


def _ops() -> Iterator[Finding]:
    """Built, for this Paddle and device, and computing what the reference does."""
    from oarlock.ops import library
    from oarlock.ops.self_check import check_norms

    try:
        import paddle

        on_gpu = paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
        if reason := library.why_missing(on_gpu):
            fix = "optional: without them training uses the plain versions, which are slower"
            yield Finding(reason, fix, warning=True)
            return
        check_norms()
        built = library.built_for()
        devices = "CPU and GPU" if built is not None and built["cuda"] else "CPU"
        yield Finding(f"fused ops ({devices}) load and agree with the reference; PaddleNLP finds them as fused_ln")
    except EnvironmentProblem as error:
        yield Finding("fused ops", str(error))
    except Exception as error:  # whatever a broken library raises is the finding
        yield Finding(f"fused ops do not load: {error!r}", "rm -r build/custom_ops; python custom_ops/build.py")


def _shared_memory() -> Iterator[Finding]:
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Finding("no /dev/shm", "data loader workers need it; in Docker: --shm-size=8g", warning=True)
        return
    free = shutil.disk_usage(path).free
    fix = "" if free >= 1 << 30 else "less than 1 GB: data loader workers may die; in Docker: --shm-size=8g"
    yield Finding(f"/dev/shm: {free / 1e9:.1f} GB free", fix, warning=True)


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    fix = "" if free >= 5e9 else "less than 5 GB here: a 7B checkpoint with optimizer states takes about 100 GB"
    yield Finding(f"disk: {free / 1e9:.1f} GB free in {Path.cwd()}", fix, warning=True)


_LAUNCHED = """
import paddle, paddle.distributed as dist
dist.init_parallel_env()
x = paddle.ones([4]) * (dist.get_rank() + 1)
dist.all_reduce(x)
assert x.tolist() == [3.0] * 4, x
print("launched", flush=True)
"""


def _launch() -> Iterator[Finding]:
    """Two processes through Paddle's launcher and one all_reduce (on GPUs: the first two, where there are two)."""
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
            passed, reason = False, [f"no end within {_LAUNCH_SECONDS} s"]
    fix = "" if passed else f"{' '.join(reason)}. Does the host name resolve (hostname -i), is a firewall in the way?"
    yield Finding("python -m paddle.distributed.launch: two processes reduce a tensor", fix)


COMMAND = Command("doctor", "Check this environment and say what to fix.", DoctorOptions, _run)
