"""Causal attention on the CPU, forward and backward, compared with Paddle's ops and torch's; its memory by length.

    python benchmarks/attention.py [--shapes 8x256x4x64 ...] [--memory 1024 2048 ...]

float32, [batch, tokens, heads, head_dim] as in models. The sides take turns within a round. A figure is the median of
the rounds; `spread` is the range of "both" divided by it. GFLOP/s count the logits that the causal mask leaves: 4
products in the forward pass and 10 more in the backward pass, each of head_dim, per logit. "Paddle ops" is PaddleNLP's
plain path: logits, mask, softmax, product. torch is F.scaled_dot_product_attention (its flash kernel on the CPU).
`packed` rows have the first shape, with examples of 16 to 128 tokens in each row; torch gets the mask. Memory is what a
process of its own needs in addition to its inputs, for 4 heads of 64, forward and backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import Peer, Runs, add_peer_flag, answer_asked, make_parser, measure_runs, peak_mb, report

SHAPES = ["8x256x4x64", "2x512x8x64", "1x1024x16x64", "1x4096x8x128"]


def ends_of(batch: int, length: int) -> np.ndarray:
    """int32 [batch, length] of packed examples (see oarlock.ops.attention)."""
    random, found = np.random.default_rng(0), np.zeros((batch, length), np.int32)
    for row in found:
        start = 0
        while start < length:
            stop = min(start + int(random.integers(16, 129)), length)
            row[start:stop] = stop
            start = stop
    return found


def visible(ends: np.ndarray) -> np.ndarray:
    """bool [batch, 1, queries, keys]."""
    places = np.arange(ends.shape[1])
    return ((places <= places[:, None]) & (places[:, None] < ends[:, None]))[:, None]


def paddle_runs(shape: list[int], packed: bool) -> Runs:
    import paddle

    from oarlock.ops import library
    from oarlock.ops.attention import fused_attention

    library.load()
    query, key, value, grad = (paddle.randn(shape) for _ in range(4))
    query.stop_gradient = key.stop_gradient = value.stop_gradient = False
    cuts = ends_of(shape[0], shape[1]) if packed else np.full(shape[:2], shape[1], np.int32)
    ends = paddle.to_tensor(cuts) if packed else None
    lowest = float(np.finfo(np.float32).min)

    def fused() -> paddle.Tensor:
        return fused_attention(query, key, value, ends)

    def plain() -> paddle.Tensor:
        q, k, v = (tensor.transpose([0, 2, 1, 3]) for tensor in (query, key, value))
        scores = paddle.matmul(q * shape[3] ** -0.5, k.transpose([0, 1, 3, 2]))
        weights = paddle.nn.functional.softmax(scores + mask, axis=-1)
        return paddle.matmul(weights, v).transpose([0, 2, 1, 3])

    def both(forward: Callable[[], paddle.Tensor]) -> None:
        paddle.autograd.backward([forward()], [grad])
        for tensor in (query, key, value):
            tensor.clear_gradient(False)

    runs: Runs = {"Oarlock": (fused, lambda: both(fused))}
    if shape[0] * shape[2] * shape[1] ** 2 <= 2**26:  # minutes beyond
        mask = paddle.to_tensor(np.where(visible(cuts), np.float32(0), np.float32(lowest)))
        runs["Paddle ops"] = (plain, lambda: both(plain))
    return runs


def torch_runs(shape: list[int], packed: bool) -> Runs:
    import torch

    query, key, value = (torch.randn(shape).requires_grad_() for _ in range(3))
    grad = torch.randn(shape)
    mask = torch.from_numpy(visible(ends_of(shape[0], shape[1]))) if packed else None

    def forward() -> torch.Tensor:
        turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
        found = torch.nn.functional.scaled_dot_product_attention(*turned, attn_mask=mask, is_causal=mask is None)
        return found.transpose(1, 2)

    def both() -> None:
        forward().backward(grad)
        query.grad = key.grad = value.grad = None

    return {"torch": (forward, both)}


def serve(threads: int) -> None:
    """The torch side."""
    import torch

    torch.set_num_threads(threads)

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        runs = torch_runs(question["shape"], question["packed"])
        return {"version": torch.__version__, "seconds": measure_runs(runs, question["seconds"])}

    answer_asked(answer)


def say_memory(side: str, length: int, threads: int) -> None:
    """MB, as JSON; for a process of its own."""
    shape = [1, length, 4, 64]
    if side == "torch":
        import torch

        torch.set_num_threads(threads)
        runs = torch_runs
    else:
        runs = paddle_runs
    runs([1, 64, 4, 64], False)[side][1]()  # what is needed once
    print(json.dumps(peak_mb(runs(shape, False)[side][1])))


def table_of_speed(options: argparse.Namespace, peer: Peer | None) -> tuple[list[dict[str, Any]], dict[str, str]]:
    rows, versions = [], {}
    cases = [(shape, False) for shape in options.shapes] + [(options.shapes[0], True)]
    for text, packed in cases:
        shape = [int(number) for number in text.split("x")]
        ours = paddle_runs(shape, packed)
        figures: dict[str, Any] = {}
        for turn in range(options.rounds + 1):  # the first one warms up
            found: dict[str, Any] = {}
            for name, pair in ours.items():
                found |= measure_runs({name: pair}, options.seconds)
                time.sleep(0.3)  # the threads of OpenMP spin for a while after their work
            if peer:
                answer = peer.ask({"shape": shape, "packed": packed, "seconds": options.seconds})
                versions["torch"] = answer["version"]
                found |= answer["seconds"]
            for name, pair in found.items() if turn else ():
                figures.setdefault(name, []).append(pair)
        medians = {n: [statistics.median(times) for times in zip(*p, strict=True)] for n, p in figures.items()}
        scores = 0.5 * shape[0] * shape[2] * shape[1] * (shape[1] + 1) * shape[3] / 1e9
        for name, (forward, both) in medians.items():
            wholes = [pair[1] for pair in figures[name]]
            rows.append(
                {
                    "shape": text + (" packed" if packed else ""),
                    "what": name,
                    "forward ms": forward * 1e3,
                    "both ms": both * 1e3,
                    "spread": (max(wholes) - min(wholes)) / both,
                    "forward GFLOP/s": "" if packed else 4 * scores / forward,
                    "both GFLOP/s": "" if packed else 14 * scores / both,
                    "Oarlock's speed, forward": forward / medians["Oarlock"][0],
                    "both": both / medians["Oarlock"][1],
                }
            )
    return rows, versions


def table_of_memory(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    rows = []
    sides = {"Oarlock": sys.executable, "Paddle ops": sys.executable} | (
        {"torch": options.peer} if options.peer else {}
    )
    for length in options.memory:
        row: dict[str, Any] = {"tokens": length, "query MB": length * 4 * 64 * 4 / 2**20}
        for side, python in sides.items():
            if side == "Paddle ops" and length > 4096:
                continue
            command = [python, __file__, "--memory-of", side, str(length), str(threads)]
            row[f"{side} MB"] = float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split()[-1])
        rows.append(row)
    return rows


def main() -> None:
    words = make_parser(__doc__)
    add_peer_flag(words, "torch")
    words.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BATCHxTOKENSxHEADSxDIM")
    words.add_argument("--memory", nargs="*", type=int, default=[1024, 2048, 4096, 8192, 16384], metavar="TOKENS")
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--seconds", type=float, default=0.2, help="of each side in a round")
    words.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    words.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    options = words.parse_args()
    if options.serve:
        serve(options.serve)
        return
    if options.memory_of:
        side, length, threads = options.memory_of
        if side != "torch":
            from oarlock.environment.paddle_import import import_paddle

            import_paddle()
        say_memory(side, int(length), int(threads))
        return

    from oarlock.environment.paddle_import import import_paddle
    from oarlock.ops.malloc import keep_freed_memory

    threads = import_paddle()
    keep_freed_memory()  # as training does
    peer = Peer(options.peer, __file__, "--serve", str(threads)) if options.peer else None
    rows, versions = table_of_speed(options, peer)
    report("attention on the CPU", rows, threads=threads, peer=versions)
    if options.memory:
        report("memory of attention on the CPU", table_of_memory(options, threads), peer=versions)


if __name__ == "__main__":
    main()
