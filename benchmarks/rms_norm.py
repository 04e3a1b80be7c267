"""RMSNorm on the CPU, forward and forward + backward, compared with a copy of as many bytes, Paddle's ops and torch.

    python benchmarks/rms_norm.py [--shapes 8192x1024 ...]

float32. The sides take turns within a round; a figure is the median of the rounds. The copy (numpy, into existing
memory) moves what a forward pass must move: it reads x and writes y. "of copy" is the time of the copy / the time of
the op. If x has 16 MB or more, calls cycle through 8 of them, for copy, op and peers alike, so that they read memory
and not a cache. Oarlock keeps freed memory, as in training (oarlock.ops.malloc). torch runs as it is, and a second time
with the same malloc settings ("memory kept"). Paddle copies the gradient that backward() is given, and that time
counts.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from common import Peer, Runs, add_peer_flag, answer_asked, make_parser, measure_runs, report

SHAPES = ["8192x1024", "4096x4096", "2048x256", "1024x512", "1024x1003"]
EPSILON = 1e-6


def in_turn(run: Callable[[int], object], size: int) -> Callable[[], object]:
    """run(i) for the next i at every call."""
    counter = itertools.cycle(range(turns(size)))
    return lambda: run(next(counter))


def turns(size: int) -> int:
    return 8 if size * 4 >= 16 << 20 else 1


def paddle_runs(rows: int, cols: int) -> Runs:
    """The fused op, and the same of Paddle's ops (as PaddleNLP's LlamaRMSNorm has it)."""
    import paddle

    from oarlock.ops import rms_norm

    size = rows * cols
    inputs = [paddle.randn([rows, cols]) for _ in range(turns(size))]
    scale, grad = paddle.ones([cols]), paddle.randn([rows, cols])
    for tensor in (*inputs, scale):
        tensor.stop_gradient = False

    def fused(i: int) -> paddle.Tensor:
        return rms_norm.fused_rms_norm(inputs[i], scale, EPSILON)[0]

    def plain(i: int) -> paddle.Tensor:
        return paddle.rsqrt(inputs[i].pow(2).mean(-1, keepdim=True) + EPSILON) * inputs[i] * scale

    def of(norm: Callable[[int], paddle.Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
        return in_turn(norm, size), in_turn(lambda i: paddle.grad([norm(i)], [inputs[i], scale], [grad]), size)

    return {"Oarlock": of(fused), "Paddle ops": of(plain)}


def torch_runs(rows: int, cols: int, note: str) -> Runs:
    """F.rms_norm, as it is and compiled."""
    import torch

    size = rows * cols
    inputs = [torch.randn(rows, cols, requires_grad=True) for _ in range(turns(size))]
    scale, grad = torch.ones(cols, requires_grad=True), torch.randn(rows, cols)

    def of(norm: Callable[..., torch.Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
        def forward(i: int) -> torch.Tensor:
            return norm(inputs[i], (cols,), scale, EPSILON)

        return (
            in_turn(forward, size),
            in_turn(lambda i: torch.autograd.grad([forward(i)], [inputs[i], scale], [grad]), size),
        )

    compiled = torch.compile(torch.nn.functional.rms_norm, dynamic=False)
    return {f"torch{note}": of(torch.nn.functional.rms_norm), f"torch.compile{note}": of(compiled)}


def copy_runs(rows: int, cols: int, threads: int) -> Runs:
    """numpy's copy, by one thread and by all."""
    size = rows * cols
    pairs = [(np.zeros(size, np.float32), np.ones(size, np.float32)) for _ in range(turns(size))]
    pool = ThreadPoolExecutor(threads)

    def by_all(i: int) -> None:
        parts = (np.array_split(array, threads) for array in pairs[i])
        list(pool.map(np.copyto, *parts))

    together, alone = in_turn(by_all, size), in_turn(lambda i: np.copyto(*pairs[i]), size)
    return {"copy": (together, together), "copy, 1 thread": (alone, alone)}


def serve_peer(threads: int, at_least: float, note: str) -> None:
    """The torch side: asked [rows, columns], answers with its version and figures."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shape: list[int] = []
    runs: Runs = {}

    def answer(asked: list[int]) -> dict[str, object]:
        nonlocal shape, runs
        if asked != shape:
            torch.compiler.reset()
            shape, runs = asked, torch_runs(asked[0], asked[1], note)
        return {"torch": torch.__version__, "seconds": measure_runs(runs, at_least)}

    answer_asked(answer)


def torch_peer(python: str, threads: int, at_least: float, note: str = "", **environment: str) -> Peer:
    """serve_peer in a Python of its own."""
    words = "--serve", str(threads), "--seconds", str(at_least), "--note", note
    return Peer(python, __file__, *words, OMP_NUM_THREADS=str(threads), **environment)


def main() -> None:
    parser = make_parser(__doc__)
    add_peer_flag(parser, "torch")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCOLS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each side in a round")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--note", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_peer(options.serve, options.seconds, options.note)
        return

    from oarlock.environment.paddle_import import import_paddle
    from oarlock.ops.malloc import keep_freed_memory

    keep_freed_memory()
    threads = import_paddle()
    peers = []
    if options.peer:
        kept = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
        peers.append(torch_peer(options.peer, threads, options.seconds))
        peers.append(torch_peer(options.peer, threads, options.seconds, ", memory kept", **kept))
    table, version = [], ""
    for shape in options.shapes:
        size = [int(number) for number in shape.split("x")]
        ours = [paddle_runs(*size), copy_runs(size[0], size[1], threads)]
        rounds = []
        for _ in range(options.rounds + 1):  # the first one warms up, and compiles
            found: dict[str, Any] = {}
            for runs in ours:
                found |= measure_runs(runs, options.seconds)
            time.sleep(0.3)  # the threads of OpenMP spin for a while after their work
            for peer in peers:
                answer = peer.ask(size)
                version = answer["torch"]
                found |= answer["seconds"]
            rounds.append(found)
        table += summary(shape, rounds[1:])
    report("RMSNorm on the CPU", table, threads=threads, torch=version)


def summary(shape: str, rounds: list[dict[str, tuple[float, float]]]) -> list[dict[str, object]]:
    """A row for each side."""
    middle = {
        name: [statistics.median(found[name][which] for found in rounds) for which in (0, 1)] for name in rounds[0]
    }
    copy = min(middle.pop("copy")[0], middle.pop("copy, 1 thread")[0])
    table: list[dict[str, object]] = []
    for name, (forward, both) in middle.items():
        times = [found[name][1] for found in rounds]
        table.append(
            {
                "shape": shape,
                "what": name,
                "forward ms": forward * 1e3,
                "of copy": copy / forward,
                "both ms": both * 1e3,
                "spread": (max(times) - min(times)) / both,
                "Oarlock is faster, forward": forward / middle["Oarlock"][0],
                "both": both / middle["Oarlock"][1],
            }
        )
    return [*table, {"shape": shape, "what": "copy", "forward ms": copy * 1e3, "of copy": 1.0}]


if __name__ == "__main__":
    main()
