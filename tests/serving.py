"""A server under test: started as users start it, and observed from outside."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as grpcclient

from helpers import LLM, free_ports

KEY = "a-key-for-the-tests"
QUESTION = "Repeat the words: river window"
# An answer so long that no machine finishes it during a test: the tests end it.
CONTEXT = 1 << 17
ENDLESS = {"ignore_eos": True, "max_tokens": 120_000}
GUARD_S = 600  # only guards against hanging
TOKENS = 12


@dataclass
class Server:
    """`oarlock serve` in a separate process."""

    folder: Path
    log: Path
    words: tuple[str, ...] = ()
    key: str = ""  # sent with requests
    environment: dict[str, str] = field(default_factory=dict)
    ports: list[int] = field(default_factory=lambda: free_ports(4))

    def __post_init__(self) -> None:
        self.openai, self.rest, self.grpc, self.metrics = self.ports
        self.url, self.rest_url = f"http://127.0.0.1:{self.openai}", f"http://127.0.0.1:{self.rest}"
        self.grpc_url = f"127.0.0.1:{self.grpc}"
        flags = ["--port", "--rest-port", "--grpc-port", "--metrics-port"]
        where = [word for pair in zip(flags, map(str, self.ports), strict=True) for word in pair]
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "oarlock", "serve", str(self.folder), *where, *self.words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(LLM), "OMP_NUM_THREADS": "1", **self.environment},
            )

    @property
    def headers(self) -> dict[str, str]:
        """Headers of a request over HTTP or gRPC."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    @property
    def admin_socket(self) -> str:
        (line,) = [line for line in self.said().splitlines() if line.strip().startswith("admin ")]
        return line.split()[4]

    def admin(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `oarlock admin` with arguments."""
        return subprocess.run(
            [sys.executable, "-m", "oarlock", "admin", "--socket", self.admin_socket, *words],
            env={**os.environ, "PYTHONPATH": str(LLM)},
            capture_output=True,
            text=True,
            timeout=GUARD_S,
            check=False,
        )

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait_ready(self, seconds: float = GUARD_S) -> None:
        deadline = time.monotonic() + seconds
        while "oarlock: ready after" not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def post(self, path: str, content: Any, timeout: float = GUARD_S) -> Any:
        headers = {"Content-Type": "application/json", **self.headers}
        request = urllib.request.Request(f"{self.rest_url}{path}", json.dumps(content).encode(), headers)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            body = answer.read()
            return json.loads(body) if body else None

    def generate(self, **fields: Any) -> Any:
        return self.post("/v2/models/oarlock/generate", fields)

    def metric(self, name: str, **labels: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        words = [f'{label}="{value}"' for label, value in labels.items()]
        found = [line for line in lines if line.startswith(name + "{") and all(word in line for word in words)]
        return sum(float(line.split()[-1]) for line in found)

    def wait_open(self, count: int, seconds: float = GUARD_S) -> None:
        """Wait until this many requests are open."""
        deadline = time.monotonic() + seconds
        while (found := self.metric("oarlock_open_requests")) != count:
            assert time.monotonic() < deadline, f"{found} requests are open, not {count}"
            time.sleep(0.02)

    def processes(self) -> list[int]:
        """All descendants of the first process."""
        parents = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        found, level = [], {self.process.pid}
        while level := {pid for pid, parent in parents.items() if parent in level}:
            found += level
        return found

    def stop(self, number: int = signal.SIGTERM, seconds: float = GUARD_S) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)

    @contextlib.contextmanager
    def asked(self, port: int, path: str, content: Any) -> Iterator[None]:
        """Keep a plain request open during the block, and disconnect its client afterwards."""
        body = json.dumps(content).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode() + body)
            yield

    def memory(self) -> list[str]:
        return [path.name for path in Path("/dev/shm").glob(f"oarlock-serve-{self.process.pid}-*")]


def find_listeners(port: int) -> set[str]:
    """Addresses on which a process listens to a port."""
    found = psutil.net_connections("tcp")
    return {
        one.laddr.ip.removeprefix("::ffff:")
        for one in found
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port
    }


def have_exited(pids: list[int], seconds: float = GUARD_S) -> bool:
    """Whether all of these processes exit within some time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(is_alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def tensor(name, values, kind):
    array = np.array(
        [v.encode() for v in values] if kind == "BYTES" else values,
        dtype={"BYTES": object, "INT32": np.int32, "FP32": np.float32, "BOOL": bool, "INT64": np.int64}[kind],
    )
    made = grpcclient.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made


def chat_tensors(question, tokens=TOKENS, **more):
    kinds = {"stream": "BOOL", "ignore_eos": "BOOL", "temperature": "FP32", "seed": "INT64", "adapter": "BYTES"}
    extra = [tensor(name, [value], kinds[name]) for name, value in more.items()]
    return [
        tensor("text_input", [question], "BYTES"),
        tensor("chat", [True], "BOOL"),
        tensor("max_tokens", [tokens], "INT32"),
        *extra,
    ]


class GrpcStream:
    """tritonclient's streaming as an iterator."""

    def __init__(self, server):
        self.client = grpcclient.InferenceServerClient(server.grpc_url)
        self.results = queue.Queue()
        self.client.start_stream(lambda result, error: self.results.put(error or result), headers=server.headers)

    def ask(self, model, inputs):
        self.client.async_stream_infer(model, inputs, enable_empty_final_response=True)
        while True:
            result = self.results.get(timeout=GUARD_S)
            if isinstance(result, Exception):
                raise result
            response = result.get_response()
            if response.outputs:
                yield result
            if response.parameters["triton_final_response"].bool_param:
                return

    def close(self):
        self.client.stop_stream(cancel_requests=True)
        self.client.close()


def wait_until(is_so, said=str, seconds=GUARD_S):
    """Wait for a condition; the limit only guards against hanging."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)
