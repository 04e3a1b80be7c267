"""The gRPC port with arbitrary input: messages of calls and streams, and raw HTTP/2 frames.

Triton is scripted, and no request reaches it that the check would refuse. A call ends with an answer or with a status
that blames the client; the connection ends; the next client is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from fuzz_grpc_request import HARNESS as REQUESTS
from fuzz_grpc_request import read
from harness import Harness
from tritonclient.grpc import service_pb2

from oarlock.serve.front.check_request import check_infer_request
from oarlock.serve.front.grpc.http2_frames import PREFACE, make_frame
from scripted_triton import GUARD_S, front_of_triton, limits

MAX_BODY = 20_000
LIMITS = limits(MAX_BODY)
DECENT = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}
SERVICE = "/inference.GRPCInferenceService"
ABOUT = ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics")
# The headers of a request by RFC 7541: POST, http, a literal path, "te: trailers" and the content type.
HEADERS = (
    b"\x83\x86\x44"
    + bytes((len(f"{SERVICE}/ModelInfer"),))
    + f"{SERVICE}/ModelInfer".encode()
    + b"\x41\x01x"
    + b"\x5f\x10application/grpc"
    + b"\x40\x02te\x08trailers"
)


class Port:
    """A front in its own thread, and a client of it."""

    def __init__(self, triton: Any, address: str) -> None:
        self.triton, self.address = triton, address
        self.num_calls = 0
        self.channel = self.connect()

    def connect(self) -> grpc.Channel:
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        return grpc.insecure_channel(self.address, options=options)

    def count(self) -> None:
        """Open a new connection before the front closes one for 1,000 oversized messages."""
        self.num_calls += 1
        if self.num_calls % 500 == 0:
            self.channel.close()
            self.channel = self.connect()

    def call(self, name: str, data: bytes) -> None:
        self.count()
        try:
            self.channel.unary_unary(f"{SERVICE}/{name}")(data, timeout=GUARD_S)
        except grpc.RpcError as error:
            assert error.code() in DECENT, (name, error.code(), error.details())

    def stream(self, *messages: bytes) -> None:
        self.count()
        try:
            for answer in self.channel.stream_stream(f"{SERVICE}/ModelStreamInfer")(iter(messages), timeout=GUARD_S):
                assert service_pb2.ModelStreamInferResponse.FromString(answer).ByteSize()
        except grpc.RpcError as error:
            assert error.code() in DECENT, (error.code(), error.details())

    def raw(self, data: bytes) -> None:
        """Send these bytes and then nothing: the server must close the connection."""
        host, _, port = self.address.rpartition(":")
        with (
            socket.create_connection((host, int(port)), timeout=GUARD_S) as connection,
            contextlib.suppress(ConnectionResetError, BrokenPipeError),
        ):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass


@contextlib.contextmanager
def run_port() -> Iterator[Port]:
    """Run the front until the block ends."""
    ready, stop = threading.Event(), threading.Event()
    found: list[Port] = []

    async def serve(folder: Path) -> None:
        async with front_of_triton(folder, max_body=MAX_BODY) as (_, triton, _, channel):
            found.append(Port(triton, channel.address))
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.05)

    with tempfile.TemporaryDirectory() as folder:
        thread = threading.Thread(target=lambda: asyncio.run(serve(Path(folder))))
        thread.start()
        try:
            assert ready.wait(GUARD_S)
            yield found[0]
            found[0].channel.close()
        finally:
            stop.set()
            thread.join()


def target(data: bytes, folder: Path, port: Port) -> None:
    kind, data = (data[:1] or b"\0")[0] % 8, data[1:]
    port.triton.seen.clear()
    if kind < 2:
        port.call("ModelInfer", data)
    elif kind == 2:
        port.call("ModelInfer", read(data).SerializeToString())
    elif kind == 3:
        port.stream(data, read(data).SerializeToString(), REQUESTS.seeds()[1])
    elif kind == 4:
        port.call(ABOUT[len(data) % len(ABOUT)], data)
    elif kind == 5:
        port.raw(data)
    elif kind == 6:
        port.raw(PREFACE + data)
    else:
        port.raw(PREFACE + make_frame(4, 0, 0) + make_frame(1, 4, 1, HEADERS) + data)
    for request in port.triton.seen:
        check_infer_request(request, LIMITS)
    port.call("ModelInfer", REQUESTS.seeds()[0])  # although its client did nothing wrong
    assert port.triton.seen


def seeds() -> list[bytes]:
    requests = REQUESTS.seeds()
    message = b"\0" + len(requests[0]).to_bytes(4, "big") + requests[0]
    begin = PREFACE + make_frame(4, 0, 0) + make_frame(1, 4, 1, HEADERS)
    frames = [
        make_frame(0, 1, 1, message),
        make_frame(0, 0, 1, message[:3]) + make_frame(0, 0, 1, message[3:]) + make_frame(0, 1, 1),
        make_frame(0, 0, 1, b"\0\x7f\xff\xff\xff" + bytes(9000)),
        make_frame(6, 0, 0, bytes(8)) + make_frame(8, 0, 0, b"\0\0\1\0") + make_frame(3, 0, 1, bytes(4)),
        make_frame(1, 0, 3, HEADERS[:9]) + make_frame(9, 4, 3, HEADERS[9:]) + make_frame(0, 1, 3, message),
    ]
    about = service_pb2.ModelConfigRequest(name="oarlock").SerializeToString()
    return [
        *(bytes((kind,)) + request for kind in (0, 2, 3) for request in requests),
        b"\4" + about,
        *(b"\7" + one for one in frames),
        *(b"\6" + begin[len(PREFACE) :] + one for one in frames[:3]),
        b"\5" + begin + frames[0],
        b"\5GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\0" + bytes(MAX_BODY * 2),
    ]


HARNESS = Harness(
    target,
    seeds,
    tokens=[
        *REQUESTS.tokens,
        *(make_frame(kind, flags, 1) for kind in range(10) for flags in (0, 1, 4, 8)),
        b"\0\0\0\0\0",
    ],
    around=run_port,
    connects=True,
)
