"""Cost of the front: requests to the same Triton, directly and through the front.

    python benchmarks/serving/front.py [--tokens 1 32] [--rounds 5]

Triton listens on a Unix socket for gRPC, which the front uses, as in `oarlock serve`. For this benchmark it also has
its own HTTP on a loopback port. "direct" asks Triton's own ports, "front" those of the front; they take turns within a
round. A client is a thread with one connection, in a process of its own. Decoding is greedy, and every answer has the
requested number of tokens.

"ms" is the median time of a request with 1 client, "more ms" the median of the differences within a round; "least" is
the difference of the fastest requests, which other programs disturb least. "per second" are requests with 8 clients, "x
direct" the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules that all benchmarks share

from common import ROOT, Peer, answer_asked, make_parser, report
from generate import make_model, make_tokenizer

WAYS = ("generate", "generate_stream", "infer", "ModelInfer", "ModelStreamInfer")
PROMPT = [7, 31, 62, 93, 124, 155, 186, 217]


# the clients, in a process of their own


def rest_asker(address: str, way: str, tokens: int) -> Callable[[], None]:
    """A connection to HOST:PORT and a request over it."""
    connection = http.client.HTTPConnection(address)
    given: dict[str, Any] = {"input_ids": PROMPT, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    path = f"/v2/models/oarlock/{way}"
    if way == "generate_stream":
        given["stream"] = True
    if way == "infer":
        kinds = {"input_ids": "INT32", "max_tokens": "INT32", "ignore_eos": "BOOL", "temperature": "FP32"}
        listed = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
        given = {"inputs": [{"name": name, "datatype": kinds[name], "shape": [len(data)], "data": data}
                            for name, data in listed.items()]}  # fmt: skip
        path = "/v2/models/oarlock_infer/infer"
    body = json.dumps(given).encode()

    def send() -> http.client.HTTPResponse:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        return connection.getresponse()

    def ask() -> None:
        try:
            answer = send()
        except ConnectionError:  # the front ended it while other ways were asked: it was idle for 5 seconds
            connection.close()
            answer = send()
        content = answer.read()
        if answer.status != 200:
            raise SystemExit(content.decode())

    return ask


def grpc_asker(address: str, way: str, tokens: int) -> Callable[[], None]:
    """A channel and a request over it."""
    import grpc
    import numpy as np
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    request = service_pb2.ModelInferRequest(model_name="oarlock" if way == "ModelStreamInfer" else "oarlock_infer")
    values = {"input_ids": np.array(PROMPT, np.int32), "max_tokens": np.array([tokens], np.int32),
              "ignore_eos": np.array([True]), "temperature": np.array([0], np.float32)}  # fmt: skip
    if way == "ModelStreamInfer":
        values["stream"] = np.array([True])
    kinds = {"int32": "INT32", "bool": "BOOL", "float32": "FP32"}
    for name, value in values.items():
        request.inputs.add(name=name, datatype=kinds[value.dtype.name], shape=value.shape)
        request.raw_input_contents.append(value.tobytes())
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(address, options=options))

    def ask() -> None:
        if way == "ModelInfer":
            stub.ModelInfer(request)
            return
        for answer in stub.ModelStreamInfer(iter([request])):
            if answer.error_message:
                raise SystemExit(answer.error_message)

    return ask


def clients_side() -> None:
    """Run the cases that stdin asks for; returns the seconds of the requests."""
    askers: dict[str, list[Callable[[], None]]] = {}

    def run(case: dict[str, Any]) -> dict[str, Any]:
        name = json.dumps([case[key] for key in ("address", "way", "tokens")])
        make = grpc_asker if case["way"].startswith("Model") else rest_asker
        kept = askers.setdefault(name, [])
        while len(kept) < case["clients"]:
            kept.append(make(case["address"], case["way"], case["tokens"]))
        times: list[float] = []

        def work(ask: Callable[[], None]) -> None:
            ask()  # opens the connection
            barrier.wait()
            for _ in range(case["requests"]):
                began = time.perf_counter()
                ask()
                times.append(time.perf_counter() - began)

        barrier = threading.Barrier(case["clients"] + 1)
        threads = [threading.Thread(target=work, args=(ask,)) for ask in kept[: case["clients"]]]
        for thread in threads:
            thread.start()
        barrier.wait()
        start = time.perf_counter()
        for thread in threads:
            thread.join()
        return {
            "seconds": time.perf_counter() - start,
            "median": statistics.median(times),
            "least": min(times),
            "count": len(times),
        }

    answer_asked(run)


# the servers


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[dict[str, dict[str, str]]]:
    """Start Triton and the front; the addresses of each for REST and gRPC."""
    sys.path.insert(0, str(ROOT / "tests"))
    from direct_triton import MODELS, direct_triton
    from helpers import free_ports
    from oarlock.export.triton import export_triton
    from oarlock.serve.config import FrontConfig, ServeConfig, TritonConfig
    from oarlock.serve.front.start import front_mark, start_front

    make_model(str(folder / "model"), "small")
    make_tokenizer(str(folder / "model"))
    export_triton(folder / "model", {}, folder / "repository")
    with direct_triton(folder / "repository", folder / "run") as triton:
        openai, rest, grpc, metrics = free_ports(4)
        config = ServeConfig(
            triton=TritonConfig(models=MODELS, run=triton.run),
            front=FrontConfig(openai_port=openai, rest_port=rest, grpc_port=grpc, metrics_port=metrics),
        )
        front = start_front(config, ())
        try:
            while not front_mark(folder / "run", front.pid).exists():
                if front.poll() is not None:
                    raise SystemExit(front.communicate()[0])
                time.sleep(0.1)
            yield {
                "direct": {"rest": triton.rest, "grpc": f"unix:{config.triton.grpc_socket}"},
                "front": {"rest": f"127.0.0.1:{rest}", "grpc": f"127.0.0.1:{grpc}"},
            }
        finally:
            front.terminate()
            front.wait()


def compare(options: argparse.Namespace, where: dict[str, dict[str, str]], clients: Peer) -> list[dict[str, Any]]:
    """Rows of the table."""
    rows = []
    for tokens in options.tokens:
        for way in options.ways:
            kind = "grpc" if way.startswith("Model") else "rest"
            rounds: list[dict[tuple[str, int], dict[str, float]]] = []
            for _ in range(options.rounds + 1):  # the first one warms up
                rounds.append({
                    (side, count): clients.ask({"address": places[kind], "way": way, "tokens": tokens, "clients": count,
                                                "requests": max(3, options.requests // count)})
                    for count in (1, 8) for side, places in where.items()
                })  # fmt: skip
            rows.append(row(way, tokens, rounds[1:]))
    return rows


def row(way: str, tokens: int, rounds: list[dict[tuple[str, int], dict[str, float]]]) -> dict[str, Any]:
    """A row of the table, for one kind of request."""

    def median(side: str) -> float:
        return 1e3 * statistics.median(one[side, 1]["median"] for one in rounds)

    def least(side: str) -> float:
        return 1e3 * min(one[side, 1]["least"] for one in rounds)

    def rate(one: dict[tuple[str, int], dict[str, float]], side: str) -> float:
        return one[side, 8]["count"] / one[side, 8]["seconds"]

    return {
        "way": way,
        "tokens": tokens,
        "direct ms": median("direct"),
        "front ms": median("front"),
        "more ms": 1e3 * statistics.median(one["front", 1]["median"] - one["direct", 1]["median"] for one in rounds),
        "more ms, least": least("front") - least("direct"),
        "direct per second": statistics.median(rate(one, "direct") for one in rounds),
        "front per second": statistics.median(rate(one, "front") for one in rounds),
        "x direct": statistics.median(rate(one, "front") / rate(one, "direct") for one in rounds),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32], help="of an answer")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=40, help="of a round, of all clients together")
    parser.add_argument("--side", choices=("clients",), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        clients_side()
        return
    with tempfile.TemporaryDirectory() as name, servers(Path(name)) as where:
        clients = Peer(sys.executable, __file__, "--side", "clients")
        rows = compare(options, where, clients)
        clients.close()  # Triton waits for open connections at its end
    report("the front compared with Triton asked directly", rows)


if __name__ == "__main__":
    main()
