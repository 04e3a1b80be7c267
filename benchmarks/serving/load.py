"""Many requests to a real server, some of them hostile: the answers, and what is left of memory, threads and files.

    python benchmarks/serving/load.py MODEL_OR_REPOSITORY [--requests 20000] [--clients 8] [--adapter NAME]

Starts `oarlock serve` on free ports and sends requests of all kinds in turn: OpenAI's completions and chat, complete
and streamed; REST's generate, generate_stream and infer; gRPC, complete and streamed; FastDeploy's JSON. Some are
hostile: wrong shapes, bodies that are too large, slow or cut off, wrong hosts and origins, wrong JSON and HTTP, streams
that the client leaves.

For each process of the server: memory (resident, MB) after the warm-up and at the end, its slope in MB for 1,000
requests (least squares over what follows the warm-up, which is the first quarter), threads and open files at both ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules that all benchmarks share

from common import ROOT, make_parser, report
from load_outcome import Outcome, Target
from load_processes import settled
from load_requests import Load

WARM_UP = 0.25


def slope(samples: list[tuple[int, dict[str, float]]], name: str) -> float:
    """MB for 1,000 requests, by least squares over what follows the warm-up."""
    points = [(done, found[name]) for done, found in samples if name in found]
    points = points[int(len(points) * WARM_UP) :]
    if len(points) < 2:
        return 0.0
    x_mean, y_mean = (sum(column) / len(points) for column in zip(*points, strict=True))
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    return 1000 * sum((x - x_mean) * (y - y_mean) for x, y in points) / spread if spread else 0.0


def run_load(target: Target, count: int, clients: int, hostile: float) -> Outcome:
    """Send requests to a running server. Its memory, threads and files are measured before, during and after."""
    asyncio.run(Load(target).run(min(count, 4 * clients * 9), clients, hostile))  # every kind, so that all is in use
    before = settled(target.process)
    outcome = asyncio.run(Load(target).run(count, clients, hostile))
    outcome.begin, outcome.end = before, settled(target.process)
    return outcome


def rows_of(outcome: Outcome) -> list[dict[str, Any]]:
    """A row per process."""
    samples = outcome.samples
    after_warm_up = samples[int(len(samples) * WARM_UP)][1] if samples else {}
    return [
        {
            "process": name,
            "MB after warm-up": after_warm_up.get(name, 0.0),
            "MB at the end": samples[-1][1].get(name, 0.0) if samples else 0.0,
            "MB per 1,000": slope(samples, name),
            "threads": f"{outcome.begin.get(name, (0, 0))[0]} -> {end[0]}",
            "open files": f"{outcome.begin.get(name, (0, 0))[1]} -> {end[1]}",
        }
        for name, end in outcome.end.items()
    ]


@contextlib.contextmanager
def started(folder: str, words: list[str]) -> Any:
    """`oarlock serve` on free ports: (process, openai, rest, grpc)."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    flags = ("--port", "--rest-port", "--grpc-port", "--metrics-port")
    where = [word for pair in zip(flags, map(str, ports), strict=True) for word in pair]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "oarlock", "serve", folder, *where, *words],
            stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT / "llm")},
        )  # fmt: skip
        try:
            while "oarlock: ready after" not in _content(log):
                if process.poll() is not None:
                    sys.exit(_content(log))
                time.sleep(0.2)
            yield process.pid, *ports[:3]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
            lines = _content(log).splitlines()
            print("\n".join(["output of the server:", *lines[-20:]]), file=sys.stderr)


def _content(log: Any) -> str:
    log.seek(0)
    return str(log.read())


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("folder")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--hostile", type=float, default=0.05, help="share of hostile requests")
    parser.add_argument("--adapter", default="")
    parser.add_argument("--samples", metavar="FILE", help="write the memory of all processes along the way (JSON)")
    arguments = parser.parse_args()
    with started(arguments.folder, []) as (pid, openai, rest, over_grpc):
        target = Target(pid, openai, rest, over_grpc, adapter=arguments.adapter)
        outcome = run_load(target, arguments.requests, arguments.clients, arguments.hostile)
    kinds: dict[str, dict[str, int]] = {}
    for (kind, answer), count in sorted(outcome.answers.items()):
        kinds.setdefault(kind, {})[answer] = count
    for kind, answers in kinds.items():
        print(f"{kind}: {', '.join(f'{answer} {count:,}' for answer, count in answers.items())}")
    print(f"{arguments.requests / outcome.seconds:.0f} requests/s, {outcome.num_unexpected} unexpected answers")
    report(
        "serving load", rows_of(outcome),
        requests=arguments.requests, seconds=round(outcome.seconds, 1), answers=kinds,
        unexpected=outcome.num_unexpected, first_unexpected=outcome.unexpected,
    )  # fmt: skip
    if arguments.samples:
        Path(arguments.samples).write_text(json.dumps(outcome.samples) + "\n", encoding="utf-8")
    sys.exit(1 if outcome.num_unexpected else 0)


if __name__ == "__main__":
    main()
