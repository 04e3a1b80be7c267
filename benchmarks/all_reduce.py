"""all_reduce between CPU ranks: Oarlock's process group, compared with Paddle's Gloo group and plain copies.

    python benchmarks/all_reduce.py [--ranks 4] [--megabytes 64] [--rounds 15]

The ranks are forked from one process that has imported Paddle, with one thread each. In every round each way runs once,
on the same float32 tensor. A rate is the size of the tensor over the time of the slowest rank, the median of the
rounds. `one copy` is np.copyto of as much memory in one rank while the others wait; `copies in all ranks` in all ranks
at once. An all_reduce needs about three of those (in, a share of each rank's, out). Latencies are of calls back to
back.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import load_average, make_parser, report

SMALL_BYTES = (4, 4096, 65536)
CALLS = 500


def repeat(call: Callable[..., Any], *arguments: Any) -> None:
    """CALLS calls back to back."""
    for _ in range(CALLS):
        call(*arguments)


def measure(megabytes: int, rounds: int, port: int, result: Path) -> int:
    """On every rank; rank 0 writes the figures.

    Args:
        port: a free one, of the store through which Paddle's Gloo group finds its ranks.
    """
    import numpy as np
    import paddle
    import paddle.distributed as dist
    from paddle.base import core
    from paddle.distributed.collective import _get_default_group

    from oarlock.cpu_ranks import process_group

    process_group.install()
    dist.init_parallel_env()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ours = _get_default_group().process_group
    gloo = core.ProcessGroupGloo.create(core.TCPStore("127.0.0.1", port, rank == 0, ranks), rank, ranks, 1)
    tensor = paddle.ones([megabytes << 18])
    source = np.ones(megabytes << 18, np.float32)
    target = np.zeros_like(source)

    def with_gloo(values: Any) -> None:
        gloo.all_reduce(values, core.ReduceOp.SUM, True).wait()

    def copy() -> None:
        np.copyto(target, source)

    def seconds(action: Callable[[], Any]) -> float:
        """The slowest rank's."""
        ours.barrier()
        begun = time.perf_counter()
        action()
        taken = paddle.to_tensor([time.perf_counter() - begun], dtype="float64")
        ours.all_reduce(taken, core.ReduceOp.MAX)
        return float(taken)

    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours.all_reduce(tensor),
        "Paddle's Gloo": lambda: with_gloo(tensor),
        "one copy": lambda: copy() if rank == 0 else None,
        "copies in all ranks": copy,
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first one touches memory for the first time
        for name, action in ways.items():
            tensor.fill_(1.0)
            taken[name].append(seconds(action))
            if turn == 0 and name in ("ours", "Paddle's Gloo"):
                assert float(tensor[0]) == float(tensor[-1]) == ranks
    small: dict[str, dict[int, float]] = {"ours": {}, "Paddle's Gloo": {}}
    for nbytes in SMALL_BYTES:
        values = paddle.zeros([nbytes // 4])
        for name, call in (("ours", ours.all_reduce), ("Paddle's Gloo", with_gloo)):
            many = functools.partial(repeat, call, values)
            per_call = [seconds(many) / CALLS for _ in range(5)]
            small[name][nbytes] = statistics.median(per_call) * 1e6
    barrier = seconds(functools.partial(repeat, ours.barrier)) / CALLS * 1e6
    if rank == 0:
        figures = {"seconds": {name: each[1:] for name, each in taken.items()}, "small": small, "barrier": barrier}
        result.write_text(json.dumps(figures), encoding="utf-8")
    ours.barrier()
    return 0


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PADDLE_DISTRI_BACKEND": "gloo"}
    from oarlock.cpu_ranks.fork_launch import launch
    from oarlock.environment.paddle_import import import_paddle

    load = load_average()
    import_paddle(1)
    with tempfile.TemporaryDirectory() as name:
        result = Path(name) / "figures.json"
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        work = functools.partial(measure, arguments.megabytes, arguments.rounds, port, result)
        codes = launch(arguments.ranks, work, Path(name) / "log", timeout_s=600, quiet=True)
        if any(codes):
            logs = "".join(log.read_text() for log in sorted(Path(name).glob("log/*")))
            raise SystemExit(f"ranks ended with {codes}\n{logs}")
        figures = json.loads(result.read_text(encoding="utf-8"))
    size = (arguments.megabytes << 20) / 1e9
    rates = {name: size / statistics.median(seconds) for name, seconds in figures["seconds"].items()}
    rows = [
        {
            "what": name,
            "GB/s": rates[name],
            "best GB/s": size / min(seconds),
            "of a copy in all ranks": rates[name] / rates["copies in all ranks"],
            "of Gloo": rates[name] / rates["Paddle's Gloo"],
            **{f"{nbytes:,} B, us": figures["small"].get(name, {}).get(str(nbytes), "") for nbytes in SMALL_BYTES},
        }
        for name, seconds in figures["seconds"].items()
    ]
    print(f"a barrier of ours takes {figures['barrier']:.0f} us")
    title = f"all_reduce of {arguments.megabytes} MiB float32, {arguments.ranks} ranks"
    report(title, rows, barrier_us=figures["barrier"], load_before=load, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
