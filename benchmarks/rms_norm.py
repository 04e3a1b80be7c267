"""RMSNorm on the CPU: forward, and forward + backward, beside a copy of as many bytes, Paddle's ops and torch.

    python benchmarks/rms_norm.py [--peer PYTHON_WITH_TORCH] [--shapes 8192x1024 ...]

float32. The sides take turns within a round; a figure is the median of the rounds. The copy (numpy, into memory that is
there) moves what a forward pass has to: it reads x and writes y; "of copy" is the copy's time / the op's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

SHAPES = ["8192x1024", "4096x4096", "2048x256", "1024x512", "1024x1003"]
EPSILON = 1e-6
Runs = dict[str, tuple[Callable[[], object], Callable[[], object]]]  # name -> (forward, forward + backward)


def paddle_runs(rows: int, cols: int) -> Runs:
    """The fused op, and the same of Paddle's ops (as PaddleNLP's LlamaRMSNorm has it)."""
    import paddle

    from oarlock.ops import library, norms

    library.load()
    x, scale, grad = paddle.randn([rows, cols]), paddle.ones([cols]), paddle.randn([rows, cols])
    x.stop_gradient = scale.stop_gradient = False

    def plain() -> paddle.Tensor:
        return paddle.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * x * scale

    def both(forward: Callable[[], paddle.Tensor]) -> None:
        paddle.autograd.backward([forward()], [grad])
        x.clear_gradient(False)
        scale.clear_gradient(False)

    def fused() -> paddle.Tensor:
        return norms.fused_rms_norm(x, scale, EPSILON)[0]

    return {"Oarlock": (fused, lambda: both(fused)), "Paddle ops": (plain, lambda: both(plain))}


def torch_runs(rows: int, cols: int) -> Runs:
    """F.rms_norm, as it is and compiled."""
    import torch

    x, scale = torch.randn(rows, cols, requires_grad=True), torch.ones(cols, requires_grad=True)
    grad = torch.randn(rows, cols)
    compiled = torch.compile(torch.nn.functional.rms_norm, dynamic=False)

    def of(norm: Callable[..., torch.Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
        def both() -> None:
            norm(x, (cols,), scale, EPSILON).backward(grad)
            x.grad = scale.grad = None

        return (lambda: norm(x, (cols,), scale, EPSILON)), both

    return {"torch F.rms_norm": of(torch.nn.functional.rms_norm), "torch.compile": of(compiled)}


def copy_runs(rows: int, cols: int, threads: int) -> Runs:
    """numpy's copy, by one thread and by all."""
    source, target = np.ones(rows * cols, np.float32), np.zeros(rows * cols, np.float32)
    pool = ThreadPoolExecutor(threads)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))

    def by_all() -> None:
        list(pool.map(lambda part: np.copyto(*part), parts))

    return {"copy": (by_all, by_all), "copy, 1 thread": (lambda: np.copyto(target, source),) * 2}


def seconds(run: Callable[[], object], at_least: float) -> float:
    """Of one call: the median of those in `at_least` seconds, at least three."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < at_least:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(runs: Runs, at_least: float) -> dict[str, tuple[float, float]]:
    """Name -> seconds forward, seconds forward + backward."""
    return {name: (seconds(forward, at_least), seconds(both, at_least)) for name, (forward, both) in runs.items()}


def serve_peer(threads: int, at_least: float) -> None:
    """The torch side: for each line `rows cols` on stdin, its figures as a JSON line."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    made: dict[str, Runs] = {}
    for line in sys.stdin:
        runs = made.setdefault(line, torch_runs(*map(int, line.split())))
        if "warm" not in made:
            made["warm"] = runs
        print(json.dumps({"torch": torch.__version__, "seconds": measure(runs, at_least)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python that has torch")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCOLS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each side in a round")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_peer(options.serve, options.seconds)
        return

    from common import report

    from oarlock.environment import import_paddle

    threads = import_paddle()
    peer = None
    if options.peer:
        command = [options.peer, __file__, "--serve", str(threads), "--seconds", str(options.seconds)]
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    rows, versions = [], {}
    for shape in options.shapes:
        size = tuple(map(int, shape.split("x")))
        ours = [paddle_runs(*size), copy_runs(*size, threads)]
        figures: dict[str, list[tuple[float, float]]] = {}
        for turn in range(options.rounds + 1):  # the first one warms up, and compiles
            found = {}
            for runs in ours:
                found |= measure(runs, options.seconds)
                time.sleep(0.3)  # the threads of OpenMP spin for a while after their work
            if peer:
                print(*size, file=peer.stdin, flush=True)
                answer = json.loads(peer.stdout.readline())
                versions["torch"] = answer["torch"]
                found |= answer["seconds"]
            for name, pair in found.items() if turn else ():
                figures.setdefault(name, []).append(pair)
        middle = {name: [statistics.median(column) for column in zip(*pairs, strict=True)] for name, pairs in figures.items()}
        copy = min(middle["copy"][0], middle["copy, 1 thread"][0])
        for name, (forward, both) in middle.items():
            times = [pair[1] for pair in figures[name]]
            rows.append(
                {
                    "shape": shape,
                    "what": name,
                    "forward ms": forward * 1e3,
                    "of copy": copy / forward,
                    "forward + backward ms": both * 1e3,
                    "spread": (max(times) - min(times)) / both,
                    "Oarlock's speed, forward": forward / middle["Oarlock"][0],
                    "both": both / middle["Oarlock"][1],
                }
            )
    if peer:
        peer.stdin.close()
        peer.wait()
    report("RMSNorm on the CPU", rows, threads=threads, peer=versions)


if __name__ == "__main__":
    main()
