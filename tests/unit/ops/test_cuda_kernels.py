"""Tests of the CUDA kernels without a GPU: they compile, keep rows in registers, bind to Paddle, and are correct when a
CPU runs them thread by thread.
"""

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


def test_a_cuda_compiler_is_installed():
    assert Path(NVCC).exists(), "no nvcc: pip install -c constraints.txt -e '.[nvcc]', or the CUDA toolkit"


def test_no_kernel_spills(tmp_path):
    """ptxas for Ampere and Hopper keeps the values of every kernel in registers."""
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
    """Against the headers of the installed Paddle, as in its GPU build."""
    flags = [*build.CXX_FLAGS, *build.binding_flags(build.Paddle.find().folder, NVCC)]
    command = ["g++", *flags, "-fsyntax-only", str(build.HERE / source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def test_flags_name_the_architectures():
    flags = build.nvcc_flags(NVCC)
    assert {"-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"} <= set(flags)
    assert (build.cuda_toolkit(NVCC) / "include" / "cuda_runtime.h").is_file()


def run_on_cpu(python, folder, *changes):
    """Run the GPU benchmark's comparisons with float64 on the kernels, emulated by cuda_on_cpu/; source changes are
    applied first.
    """
    headers = [str(path.relative_to(build.HERE)) for path in build.HERE.glob("*/*.cuh")]
    sources = {name: (build.HERE / name).read_text() for name in (*build.CUDA_KERNELS, *headers)}
    for name, old, new in changes:
        assert sources[name].count(old) == 1, old
        sources[name] = sources[name].replace(old, new)
    for name, source in sources.items():
        source = re.sub(
            r"(\w+(?:<[^<>]*>)?)\s*<<<(.+?)>>>\((.*?)\);", r"emulated::Launch(\2)([&] { \1(\3); });", source, flags=re.S
        )
        source = re.sub(r"extern __shared__ float (\w+)\[\];", r"float* \1 = emulated::dynamic_shared();", source)
        assert "<<<" not in source
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    includes = [f"-I{folder}", f"-I{build.HERE}", f"-isystem{build.cuda_toolkit(NVCC) / 'include'}"]
    kernels = f'-DKERNELS="{folder / build.CUDA_KERNELS[0]}"'
    command = ["g++", "-std=c++17", "-O2", "-w", "-fPIC", "-shared", *includes, kernels]
    subprocess.run(
        [*command, str(ROOT / "tests" / "cuda_on_cpu" / "norms.cc"), "-o", str(folder / "kernels.so")], check=True
    )
    benchmark = ROOT / "benchmarks" / "rms_norm_gpu.py"
    command = [python, str(benchmark), "--on_cpu", str(folder / "kernels.so")]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_kernels_are_correct_when_emulated_on_a_cpu(parity_python, tmp_path):
    """Every kernel, for all shapes, types and kinds of norm: values, bounds, barriers; thread order changes no bit."""
    result = run_on_cpu(parity_python, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "750 comparisons with float64: all right\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("common/cuda.cuh", "turn ^= 1;", ""), "wrong: y of layer"),
        (
            ("common/cuda.cuh", "__syncthreads();\n    float total", "float total"),
            "results depend on the order of the threads",
        ),
        (
            ("rms_norm/forward_kernels.cuh", "(col < cols) {\n        const Pack<X, N> given", "(col <= cols) {\n        const Pack<X, N> given"),
            "an access outside of a tensor",
        ),
    ],
)  # fmt: skip
def test_a_wrong_kernel_is_detected_on_a_cpu(parity_python, tmp_path, change, words):
    result = run_on_cpu(parity_python, tmp_path, change)
    assert result.returncode and words in result.stdout + result.stderr
