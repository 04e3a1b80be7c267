"""Builds the fused ops into one shared library, oarlock_ops.so, and oarlock_gemm.so, which puts oneDNN's products in
the place of MKL's (llm/oarlock/environment/matmul_library.py says where). Needs the standard library and an installed
Paddle.

    python custom_ops/build.py [--into FOLDER]      default: llm/oarlock/ops of this tree

The root setup.py calls build() too. What has not changed is not compiled again (objects live in build/custom_ops).
Without g++ or Paddle nothing is built, and the reason is said; the suite then uses its reference versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
OBJECTS = HERE.parent / "build" / "custom_ops"
PLACE = HERE.parent / "llm" / "oarlock" / "ops"
LIBRARY, STAMP = "oarlock_ops.so", "oarlock_ops.stamp"
PRODUCTS = "oarlock_gemm.so"
# Raise it with every operator that is new or takes other arguments, here and in llm/oarlock/ops/library.py, which
# leaves a library of another number alone.
INTERFACE = 6

# CPU kernels, free of Paddle: each is compiled once per instruction set, into a namespace of its own.
CPU_KERNELS = (
    "adamw/adamw.cc",
    "attention/attention_backward_cpu.cc",
    "attention/attention_forward_cpu.cc",
    "copy_matrix/copy_matrix.cc",
    "decoder/decoder_cpu.cc",
    "linear_cross_entropy/linear_cross_entropy.cc",
    "rms_norm/rms_norm_cpu.cc",
    "rotary/rotary.cc",
    "swiglu/swiglu.cc",
)
# C++ that is compiled once, without Paddle.
SHARED = ("common/gemm.cc", "common/isa.cc")
# A library of its own, where Paddle brings the two that it needs.
PRODUCTS_SOURCE = "common/onednn_gemm.cc"
PRODUCTS_NEEDS = ("libmklml_intel.so", "libdnnl.so.3", "libiomp5.so")
# CUDA kernels, free of Paddle: compiled where there is nvcc and Paddle is a GPU build.
CUDA_KERNELS = ("rms_norm/rms_norm_cuda.cu",)
# What registers the kernels as Paddle operators.
BINDINGS = (
    "adamw/adamw_paddle.cc",
    "attention/attention_paddle.cc",
    "decoder/decoder_paddle.cc",
    "decoder_layer/decoder_layer_paddle.cc",
    "linear_cross_entropy/linear_cross_entropy_paddle.cc",
    "lora_linear/lora_linear_paddle.cc",
    "rms_norm/rms_norm_paddle.cc",
    "rotary/rotary_paddle.cc",
    "swiglu/swiglu_paddle.cc",
)

INSTRUCTION_SETS = {
    "plain": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall"]
# GCC 12 warns about its own AVX-512 headers, and about an ABI that no function here passes a boundary with.
CXX_FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized"]


class CannotBuild(Exception):
    """This machine lacks what the build needs; the message says what."""


@dataclass(frozen=True)
class Paddle:
    """The Paddle to build for, read from its files: importing it takes seconds, and pip hides it from builds."""

    folder: Path
    version: str
    cuda: str  # "" for a CPU build

    @classmethod
    def find(cls) -> Paddle:
        """The Paddle of this interpreter, or of the environment that pip's isolated build runs in.

        Raises:
            CannotBuild: when there is none.
        """
        folders = [Path(sysconfig.get_path("purelib")) / "paddle"]
        spec = find_spec("paddle")
        if spec is not None and spec.origin:
            folders.insert(0, Path(spec.origin).parent)
        for folder in folders:
            version = folder / "version" / "__init__.py"
            if (folder / "include").is_dir() and version.is_file():
                values = dict(re.findall(r"^(\w+)\s*=\s*'(.*)'", version.read_text(encoding="utf-8"), re.MULTILINE))
                cuda = values.get("cuda_version", "False")
                return cls(folder, values["full_version"], "" if cuda == "False" else cuda)
        raise CannotBuild(f"Paddle is not installed in this Python ({sys.executable}); the ops are built against it")


@dataclass(frozen=True)
class Job:
    """One object file. Its name holds a hash of all that goes into it, so an existing one is up to date."""

    source: Path
    command: tuple[str, ...]
    object: Path

    @classmethod
    def of(cls, source: str, label: str, command: list[str], context: str) -> Job:
        """`context` is all else that the object depends on; the place of Paddle's headers is not, but its version."""
        flags = [flag for flag in command if not flag.startswith("-isystem")]
        digest = hashlib.sha256("\0".join((context, *flags)).encode())
        for path in (HERE / source, *sorted(HERE.glob("*/*.*h"))):  # bindings include other folders' headers
            digest.update(path.read_bytes())
        name = f"{source.replace('/', '-')}-{label}-{digest.hexdigest()[:16]}.o"
        return cls(HERE / source, tuple(command), OBJECTS / name)

    def run(self) -> None:
        """Compile."""
        partial = self.object.with_suffix(f".{os.getpid()}")
        _run([*self.command, "-c", str(self.source), "-o", str(partial)])
        partial.replace(self.object)


def build(into: Path = PLACE) -> Path:
    """Compile what changed and link `into`/oarlock_ops.so; its stamp says for which Paddle.

    Raises:
        CannotBuild: without g++, Paddle or Linux.
        subprocess.CalledProcessError: when the compiler refuses; its words are on stderr.
    """
    compiler, paddle = _compiler(), Paddle.find()
    nvcc = _nvcc(paddle)
    jobs = _jobs(compiler, paddle, nvcc)
    into.mkdir(parents=True, exist_ok=True)
    library, products, stamp = into / LIBRARY, into / PRODUCTS, into / STAMP
    of_products = _products_job(compiler, paddle)
    wanted = {
        "interface": INTERFACE,
        "paddle": paddle.version,
        "cuda": paddle.cuda if nvcc else "",
        "objects": [job.object.name for job in (*jobs, *of_products)],
    }
    whole = library.exists() and (products.exists() or not of_products)
    if whole and stamp.exists() and json.loads(stamp.read_text()) == wanted:
        _say(f"{library} is up to date ({_devices(paddle, nvcc)})")
        return library
    started = time.monotonic()
    OBJECTS.mkdir(parents=True, exist_ok=True)
    everything = [*jobs, *of_products]
    missing = [job for job in everything if not job.object.exists()]
    _say(f"compiling {len(missing)} of {len(everything)} files for Paddle {paddle.version} ({_devices(paddle, nvcc)})")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(Job.run, missing))
    stamp.unlink(missing_ok=True)
    products.unlink(missing_ok=True)
    _link(compiler, jobs, library, _link_flags(paddle, nvcc))
    if of_products:
        _link(compiler, of_products, products, _products_link_flags(paddle))
    stamp.write_text(json.dumps(wanted, indent=1) + "\n")
    _remove_stale(everything)
    _say(f"built {library} in {time.monotonic() - started:.0f} s")
    return library


def build_or_say(into: Path = PLACE) -> Path | None:
    """build(), or a line that says why there is none."""
    try:
        return build(into)
    except CannotBuild as reason:
        _say(f"the fused ops are not built: {reason}. Training works without them, slower (reference versions)")
        return None


def _jobs(compiler: str, paddle: Paddle, nvcc: str | None) -> list[Job]:
    context = _version(compiler) + paddle.version + paddle.cuda
    cxx = [compiler, *CXX_FLAGS, f"-I{HERE}"]
    sets = INSTRUCTION_SETS if platform.machine() == "x86_64" else {"plain": []}
    jobs = [
        Job.of(source, name, [*cxx, *flags, f"-DOARLOCK_ISA={name}", f"-DOARLOCK_ISA_{name.upper()}"], context)
        for source in CPU_KERNELS
        for name, flags in sets.items()
    ]
    jobs += [Job.of(source, "shared", cxx, context) for source in SHARED]
    if nvcc:
        arguments = [nvcc, *nvcc_flags(nvcc), f"-I{HERE}", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        jobs += [Job.of(source, "cuda", arguments, context) for source in CUDA_KERNELS]
    # Paddle's headers are heavy and the bindings compute nothing: -O1 halves their time.
    binding = [*cxx, "-O1", *binding_flags(paddle.folder, nvcc)]
    return [Job.of(source, "paddle", binding, context) for source in BINDINGS] + jobs


def _products_job(compiler: str, paddle: Paddle) -> list[Job]:
    """Of oarlock_gemm.so; none where this Paddle has no MKL or no oneDNN to choose from."""
    if not all((paddle.folder / "libs" / name).exists() for name in PRODUCTS_NEEDS):
        return []
    return [Job.of(PRODUCTS_SOURCE, "products", [compiler, *CXX_FLAGS], _version(compiler) + paddle.version)]


def _products_link_flags(paddle: Paddle) -> list[str]:
    """See _link_flags. It is found by its name, as those are that it needs."""
    needed = (f"-l:{name}" for name in PRODUCTS_NEEDS)
    flags = [f"-L{paddle.folder / 'libs'}", f"-Wl,-soname,{PRODUCTS}", "-Wl,--no-as-needed", *needed]
    return [*flags, "-Wl,-z,defs", "-Wl,--allow-shlib-undefined"]


def _link(compiler: str, jobs: list[Job], library: Path, flags: list[str]) -> None:
    partial = library.with_suffix(f".{os.getpid()}")
    _run([compiler, "-shared", *(str(job.object) for job in jobs), "-o", str(partial), *flags])
    partial.replace(library)  # a process that has the old one loaded keeps it


def binding_flags(paddle: Path, nvcc: str | None) -> list[str]:
    """For what includes Paddle's headers; with nvcc: for its GPU build."""
    flags = [f"-I{HERE}", f"-isystem{paddle / 'include'}", f"-isystem{paddle / 'include' / 'third_party'}"]
    if nvcc:
        toolkit = cuda_toolkit(nvcc) / "include"
        flags += ["-DPADDLE_WITH_CUDA", f"-isystem{toolkit}", f"-isystem{toolkit / 'cccl'}"]  # CUDA 13's Thrust
    return flags


def nvcc_flags(nvcc: str) -> list[str]:
    """Code for the generations from Volta on that this nvcc knows (a card runs that of its generation), and PTX."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {int(number) for number in re.findall(r"compute_(\d+)$", listed, re.MULTILINE)}
    wanted = sorted(known & {70, 75, 80, 90, 100, 120})
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in wanted]
    return ["-std=c++17", "--threads", "0", *flags, f"-gencode=arch=compute_{wanted[-1]},code=compute_{wanted[-1]}"]


def cuda_toolkit(nvcc: str) -> Path:
    """The folder with CUDA's include/ and lib64/, as nvcc itself sees it (the one in PATH may be a script)."""
    said = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
    return Path(re.findall(r"^#\$ TOP=(.*)$", said.stderr, re.MULTILINE)[0].strip()).resolve()


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _compiler() -> str:
    if sys.platform != "linux":
        raise CannotBuild(f"they are written for Linux, not {sys.platform}")
    name = os.environ.get("CXX", "g++")
    compiler = shutil.which(name)
    if compiler is None:
        raise CannotBuild(f"there is no {name} (Debian, Ubuntu: apt-get install g++)")
    return compiler


def _nvcc(paddle: Paddle) -> str | None:
    """The nvcc to use; None for a CPU build of Paddle, or where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) if paddle.cuda and CUDA_KERNELS else None


def _devices(paddle: Paddle, nvcc: str | None) -> str:
    if nvcc:
        return f"CPU and GPU, {nvcc}"
    return "CPU only: there is no nvcc" if paddle.cuda else "CPU only: this Paddle is a CPU build"


def _link_flags(paddle: Paddle, nvcc: str | None) -> list[str]:
    """No run path: Paddle is in the process before the library, and its parts are found by their names.

    -fopenmp is left out of the link: OpenMP calls go to Paddle's libiomp5 (which has GNU's entry points too), so that
    the process has one pool of threads.
    """
    folders = paddle.folder / "base", paddle.folder / "libs"
    has_openmp = (folders[1] / "libiomp5.so").exists()
    needed = ["libpaddle.so", "libphi.so", "libphi_core.so", "libcommon.so", "libiomp5.so"]
    flags = [*(f"-L{folder}" for folder in folders), "-Wl,--no-as-needed"]
    flags += [f"-l:{name}" for name in needed if any((folder / name).exists() for folder in folders)]
    flags += [] if has_openmp else ["-fopenmp"]
    if nvcc:
        flags += [f"-L{cuda_toolkit(nvcc) / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return [*flags, "-Wl,-z,defs", "-Wl,--allow-shlib-undefined"]


def _remove_stale(jobs: list[Job]) -> None:
    """Objects of older sources; those of the last day stay, another environment may share this tree."""
    current = {job.object for job in jobs}
    for path in OBJECTS.glob("*.o"):
        if path not in current and time.time() - path.stat().st_mtime > 86400:
            path.unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        print(" ".join(command), result.stderr, sep="\n", file=sys.stderr)
        raise subprocess.CalledProcessError(result.returncode, command[0])
    if result.stderr:
        print(result.stderr, end="", file=sys.stderr)


def _say(message: str) -> None:
    print(f"custom ops: {message}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=PLACE, help="folder of the library")
    try:
        sys.exit(0 if build_or_say(parser.parse_args().into) else 3)
    except subprocess.CalledProcessError as failure:
        sys.exit(f"custom ops: {failure}")
