"""RMSNorm on an NVIDIA GPU: correctness of the CUDA kernels, and their speed compared with torch, Liger and QuACK.

    python benchmarks/rms_norm_gpu.py                    everything: nvcc, correctness, compute-sanitizer, table
    python benchmarks/rms_norm_gpu.py --check            correctness only (what compute-sanitizer runs)
    python benchmarks/rms_norm_gpu.py --on_cpu LIBRARY   correctness of a CPU build, as the tests make it

Needs nvcc and a torch with CUDA, which holds the buffers and is one of the peers. Paddle is not needed. Calls cycle
through several sets of buffers, more than the L2 cache holds. Times are medians of CUDA events over the rounds, in
which the sides take turns. GB/s counts what must be moved: forward reads x and writes y; backward reads x and the
gradient of y and writes that of x. The ceiling is the rate of torch's copy of as many bytes in the same rounds. Liger
and QuACK are measured if they are installed (liger_kernel, quack).
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

KERNELS = Path(__file__).resolve().parent.parent / "custom_ops"
EPSILON = 1e-6
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = [(8192, 4096), (8192, 8192), (8192, 1024), (32768, 256), (512, 4096), (8192, 4097), (8192, 127), (4096, 16384)]
CHECKED = [(33, 64), (5, 67), (19, 1000), (7, 4096), (3, 4097), (5, 8192), (2, 16384), (2, 20001), (1, 8), (3000, 48)]
_NAMES_FORWARD = ("x", "residual", "scale", "bias", "y", "sum", "mean", "invvar")
_NAMES_BACKWARD = ("h", "scale", "grad_y", "grad_sum", "mean", "invvar", "grad_x", "grad_residual", "grad_scale")


class Forward(ctypes.Structure):
    """NormForward of custom_ops/rms_norm/rms_norm.h."""

    _fields_ = [
        ("rows", ctypes.c_int64), ("cols", ctypes.c_int64), ("epsilon", ctypes.c_float),
        ("x_type", ctypes.c_int32), ("scale_type", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in _NAMES_FORWARD),
    ]  # fmt: skip


class Backward(ctypes.Structure):
    """NormBackward of custom_ops/rms_norm/rms_norm.h."""

    _fields_ = [
        ("rows", ctypes.c_int64), ("cols", ctypes.c_int64), ("x_type", ctypes.c_int32), ("scale_type", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in (*_NAMES_BACKWARD, "grad_bias", "workspace")),
    ]  # fmt: skip


def build(folder: str) -> Path:
    """The library of CUDA kernels in this folder, made by nvcc for this GPU where it is not there yet."""
    path = Path(folder) / "norms.so"
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    command = ["nvcc", "-std=c++17", f"-I{KERNELS}", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC"]
    if not path.exists():
        subprocess.run([*command, str(KERNELS / "rms_norm/rms_norm_cuda.cu"), "-o", str(path)], check=True)
    return path


class Kernels:
    """That library, or a build of the same source for tensors on the CPU."""

    def __init__(self, library: Path, device: str = "cuda") -> None:
        self.device = device
        self._library = ctypes.CDLL(str(library))
        self._library.norm_cuda_workspace.restype = ctypes.c_int64
        self._library.norm_cuda_error.restype = ctypes.c_char_p
        self._workspaces: dict[tuple[int, bool], torch.Tensor] = {}

    def forward(self, x: torch.Tensor, scale: torch.Tensor, out: dict[str, torch.Tensor], **more: torch.Tensor) -> None:
        """Writes out["y"], out["invvar"] and, with bias or residual in `more`, out["mean"], out["sum"]."""
        tensors = {"x": x, "scale": scale, **out, **more}
        args = Forward(*x.shape, EPSILON, TYPES[x.dtype], TYPES[scale.dtype], **_pointers(tensors))
        self._call(self._library.norm_forward_cuda, args)

    def backward(self, h: torch.Tensor, scale: torch.Tensor, **tensors: torch.Tensor) -> None:
        """Writes the tensors that are named grad_x, grad_residual, grad_scale, grad_bias."""
        key = (h.shape[1], "grad_bias" in tensors)
        if key not in self._workspaces:
            floats = self._library.norm_cuda_workspace(*(ctypes.c_int64(n) for n in h.shape), ctypes.c_bool(key[1]))
            self._workspaces[key] = torch.empty(floats, device=self.device)
        pointers = _pointers({"h": h, "scale": scale, "workspace": self._workspaces[key], **tensors})
        self._call(self._library.norm_backward_cuda, Backward(*h.shape, TYPES[h.dtype], TYPES[scale.dtype], **pointers))

    def _call(self, function: Any, args: ctypes.Structure) -> None:
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None
        code = function(ctypes.byref(args), ctypes.c_void_p(stream))
        if code:
            raise SystemExit(f"CUDA: {self._library.norm_cuda_error(code).decode()}")


def _pointers(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def check(kernels: Kernels) -> int:
    """RMSNorm, LayerNorm, a residual, and an input that goes on, against float64; the number of comparisons.

    Raises:
        SystemExit: at the first that is wrong.
    """
    torch.manual_seed(0)
    compared = 0
    pairs = [(x, scale) for x in TYPES for scale in TYPES]
    for index, (rows, cols) in enumerate(CHECKED):
        for x_type, scale_type in pairs if index < 2 else [(t, t) for t in TYPES] + [(torch.bfloat16, torch.float32)]:
            for kind in ("rms", "layer", "residual", "kept"):
                compared += _check_one(kernels, rows, cols, x_type, scale_type, kind)
    return compared


def _check_one(kernels: Kernels, rows: int, cols: int, x_type: torch.dtype, scale_type: torch.dtype, kind: str) -> int:
    def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, device=kernels.device).to(dtype)

    def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, float("nan"), device=kernels.device, dtype=dtype)

    x, residual, grad_sum = (random(rows, cols, dtype=x_type) for _ in range(3))
    scale, bias = (random(cols, dtype=scale_type) for _ in range(2))
    grad_y = random(rows, cols, dtype=scale_type)
    out = {"y": nothing(rows, cols, dtype=scale_type), "invvar": nothing(rows)}
    grads = {"grad_x": nothing(rows, cols, dtype=x_type), "grad_scale": nothing(cols, dtype=scale_type)}
    more, given = {}, {}
    if kind == "layer":
        more, out["mean"], grads["grad_bias"] = {"bias": bias}, nothing(rows), nothing(cols, dtype=scale_type)
    if kind == "residual":
        more, out["sum"] = {"residual": residual}, nothing(rows, cols, dtype=x_type)
        grads["grad_residual"] = nothing(rows, cols, dtype=x_type)
    if kind in ("residual", "kept"):
        given = {"grad_sum": grad_sum}
    kernels.forward(x, scale, out, **more)
    h = out.get("sum", x)
    saved = {name: out[name] for name in ("mean", "invvar") if name in out}
    kernels.backward(h, scale, grad_y=grad_y, **saved, **given, **grads)

    wide = [t.double().requires_grad_() for t in (h, scale, bias)]
    centred = wide[0] - wide[0].mean(-1, keepdim=True) if kind == "layer" else wide[0]
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPSILON) * wide[1]
    y = y + wide[2] if kind == "layer" else y
    exact = torch.autograd.grad([y], wide, [grad_y.double()], allow_unused=True)
    wanted = {"y": y, "grad_x": exact[0] + (grad_sum.double() if given else 0), "grad_scale": exact[1]}
    if kind == "layer":
        wanted["grad_bias"] = exact[2]
    if kind == "residual":
        wanted |= {"grad_residual": wanted["grad_x"], "sum": x.double() + residual.double()}
    for name, value in wanted.items():
        found = (out | grads)[name]
        far = ((found.double() - value).abs() / (value.abs() + value.square().mean().sqrt() + 1e-3)).max().item()
        if not far < 4 * TOLERANCE[found.dtype]:  # NaN too
            raise SystemExit(f"wrong: {name} of {kind} {rows} x {cols} {x_type} {scale_type}: off by {far:.3g}")
    return len(wanted)


Sides = dict[str, tuple[Callable[[int], object], Callable[[int], object]]]  # forward(i), backward(i) on buffers i


def sides(kernels: Kernels, rows: int, cols: int, sets: int, dtype: torch.dtype) -> Sides:
    """Oarlock, the copies and the peers; each on its own of `sets` sets of buffers."""
    xs = [torch.randn(rows, cols, device="cuda").to(dtype).requires_grad_() for _ in range(sets)]
    grads = [torch.randn(rows, cols, device="cuda").to(dtype) for _ in range(sets)]
    outs = [torch.empty(rows, cols, device="cuda", dtype=dtype) for _ in range(sets)]
    scale = torch.ones(cols, device="cuda", dtype=dtype, requires_grad=True)
    grad_scale, invvar = torch.empty_like(scale), torch.empty(rows, device="cuda")
    half = rows // 2

    def copy_two_to_one(i: int) -> None:  # as many bytes as a backward pass moves: 1.5 copies
        outs[i].copy_(xs[i].detach())
        outs[i][:half].copy_(grads[i][:half])

    found: Sides = {
        "copy": (lambda i: outs[i].copy_(xs[i].detach()), copy_two_to_one),
        "Oarlock": (
            lambda i: kernels.forward(xs[i], scale, {"y": outs[i], "invvar": invvar}),
            lambda i: kernels.backward(
                xs[i], scale, grad_y=grads[i], invvar=invvar, grad_x=outs[i], grad_scale=grad_scale
            ),
        ),
    }
    for name, norm in _peers(cols, scale):
        ys = [norm(x) for x in xs]  # graphs to go back through

        def backward(i: int, ys: list[torch.Tensor] = ys) -> object:
            return torch.autograd.grad([ys[i]], [xs[i], scale], [grads[i]], retain_graph=True)

        def forward(i: int, norm: Callable[[torch.Tensor], torch.Tensor] = norm) -> object:
            return norm(xs[i])

        found[name] = (forward, backward)
    return found


def _peers(cols: int, scale: torch.Tensor) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    def plain(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (cols,), scale, EPSILON)

    torch.compiler.reset()
    yield "torch F.rms_norm", plain
    yield "torch.compile", torch.compile(plain, dynamic=False)
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        yield "Liger", lambda x: LigerRMSNormFunction.apply(x, scale, EPSILON, 0.0, "llama", False)
    except ImportError:
        print("Liger is not installed (pip install liger-kernel)")
    try:
        from quack import rmsnorm

        yield "QuACK", lambda x: rmsnorm(x, scale, eps=EPSILON)
    except ImportError:
        print("QuACK is not installed (pip install quack-kernels)")


def milliseconds(run: Callable[[int], object], sets: int) -> float:
    """Of one call; each of the sets is used in turn, twice."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(2 * sets):
        run(i % sets)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / (2 * sets)


def measure(kernels: Kernels, rows: int, cols: int, rounds: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The rows of the table for one shape."""
    size = rows * cols * torch.finfo(dtype).bits // 8
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = max(2, min(64, 4 * cache // size + 1))
    all_sides = sides(kernels, rows, cols, sets, dtype)
    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 2):  # the first two warm up, and compile
        for name, pair in all_sides.items():
            for which, run in enumerate(pair):
                value = milliseconds(run, sets)
                if turn >= 2:
                    times.setdefault((name, which), []).append(value)
    middle = {key: statistics.median(values) for key, values in times.items()}
    table = []
    for name in all_sides:
        row: dict[str, Any] = {"shape": f"{rows} x {cols}", "what": name}
        for which, (word, moved) in enumerate((("forward", 2), ("backward", 3))):
            row[f"{word} ms"] = middle[name, which]
            row[f"{word} GB/s"] = moved * size / middle[name, which] / 1e6
            row[f"{word} of copy"] = middle["copy", which] / middle[name, which]
            row[f"{word} spread"] = (max(times[name, which]) - min(times[name, which])) / middle[name, which]
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--build", help="folder for the library of kernels (default: a temporary one)")
    parser.add_argument("--on_cpu", metavar="LIBRARY", type=Path)
    options = parser.parse_args()
    if options.on_cpu:
        print(f"{check(Kernels(options.on_cpu, 'cpu'))} comparisons with float64: all right")
        return
    from common import report  # needs tqdm; better to miss it now than after the measurement

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.build or temporary
        kernels = Kernels(build(folder))
        print(f"{check(kernels)} comparisons with float64: all right", flush=True)
        if options.check:
            return
        if sanitizer := shutil.which("compute-sanitizer"):
            command = [sanitizer, "--error-exitcode", "9", sys.executable, __file__, "--check", "--build", folder]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            verdict = (
                "no errors" if result.returncode == 0 else f"FAILED:\n{result.stdout[-3000:]}{result.stderr[-1000:]}"
            )
            print(f"compute-sanitizer: {verdict}", flush=True)
        else:
            print("compute-sanitizer is not installed")
        table = [row for shape in SHAPES for row in measure(kernels, *shape, options.rounds, torch.bfloat16)]
    about = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "cuda": torch.version.cuda}
    report(f"RMSNorm in bfloat16 on {about['gpu']}", table, **about)


if __name__ == "__main__":
    main()
