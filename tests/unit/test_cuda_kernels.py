"""What can be known of the CUDA kernels without a GPU: they compile, keep rows in registers, and bind to Paddle."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from helpers import ROOT

PACKAGED = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvcc"  # scripts/test.sh installs it
NVCC = shutil.which("nvcc") or str(PACKAGED)

spec = importlib.util.spec_from_file_location("build_custom_ops", ROOT / "custom_ops" / "build.py")
build = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = build
spec.loader.exec_module(build)


def test_there_is_a_compiler():
    assert Path(NVCC).exists(), "no nvcc: pip install -c constraints.txt -e '.[nvcc]', or the CUDA toolkit"


def test_no_kernel_spills(tmp_path):
    """ptxas for Ampere and Hopper: every kernel's values stay in registers."""
    for source in build.CUDA_KERNELS:
        started = {
            arch: subprocess.Popen(
                [NVCC, "-std=c++17", f"-I{build.HERE}", f"-arch={arch}", "-Xptxas", "-v",
                 "-c", str(build.HERE / source), "-o", str(tmp_path / f"{arch}.o")],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for arch in ("sm_80", "sm_90")
        }  # fmt: skip
        for arch, process in started.items():
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-3000:]
            found = re.findall(r"Function properties for (\w+)\s+.*?(\d+) bytes spill stores, (\d+) bytes", output)
            assert len(found) >= 40, output[-3000:]
            spilling = [name for name, stores, loads in found if (stores, loads) != ("0", "0")]
            assert not spilling, f"{arch}: {spilling}"


@pytest.mark.parametrize("source", build.BINDINGS)
def test_the_gpu_binding_compiles(source):
    """Against the headers of the Paddle that is here, as its GPU build has them."""
    flags = [*build.CXX_FLAGS, *build.binding_flags(build.Paddle.find().folder, NVCC)]
    command = ["g++", *flags, "-fsyntax-only", str(build.HERE / source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def test_flags_name_the_architectures():
    flags = build.nvcc_flags(NVCC)
    assert {"-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"} <= set(flags)
    assert (build.cuda_toolkit(NVCC) / "include" / "cuda_runtime.h").is_file()
