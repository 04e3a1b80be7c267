"""The gRPC port: its limits, its encryption, and which calls there are (service.py has what they do)."""

from __future__ import annotations

import os
import secrets
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc

from oarlock.errors import ConfigError, EnvironmentProblem
from oarlock.serve.front.admission import Admission
from oarlock.serve.front.grpc.gate import GateOptions, GrpcGate
from oarlock.serve.front.grpc.http2_frames import MAX_FRAME
from oarlock.serve.front.grpc.service import ASKED, GrpcService
from oarlock.serve.front.http.server import num_connections
from oarlock.serve.front.http.tls_connections import count_handshakes
from oarlock.serve.front.keys import Keys
from oarlock.serve.front.metrics import FrontCounts
from oarlock.serve.front.options import FrontOptions
from oarlock.serve.front.upstream import SERVICE, Upstream
from oarlock.serve.supervision.listening import open_port

_HEALTH = "/grpc.health.v1.Health/Check"
_ENVELOPE = 16384  # bytes of a request beside the contents of its tensors


class GrpcServer:
    """The port, and gRPC's own server behind it."""

    def __init__(self, options: FrontOptions, service: GrpcService, gate: GrpcGate, server: grpc.aio.Server) -> None:
        """See make_grpc_server()."""
        self._options, self._gate, self._server = options, gate, server
        self._service = service

    async def start(self) -> None:
        """Take calls.

        Raises:
            ConfigError: when a file for TLS can't be used.
            EnvironmentProblem: when the port can't be had.
        """
        tls = server_context(self._options) if self._options.has_tls else None
        sockets = _sockets(self._options)
        await self._server.start()
        await self._gate.start(sockets, tls)

    async def stop(self, grace: float | None = None) -> None:
        """Take no more; what is open has `grace` seconds."""
        self._gate.close()
        await self._server.stop(grace)
        await self._gate.end()


def make_grpc_server(
    options: FrontOptions,
    upstream: Upstream,
    keys: Keys,
    admission: Admission,
    counts: FrontCounts | None = None,
) -> GrpcServer:
    """A server for the port of `options`."""
    header = f"oarlock-peer-{secrets.token_hex(8)}"
    service = GrpcService(options, upstream, keys, admission, counts or FrontCounts(), header)
    server = grpc.aio.server(
        options=_server_options(options.max_body, options.max_open),
        maximum_concurrent_rpcs=options.max_connections,
        handlers=[_Doors(service)],
    )
    folder = Path(options.triton_grpc.removeprefix("unix:")).parent  # of this user alone
    path = f"{folder}/front-grpc-{os.getpid()}"
    server.add_insecure_port(f"unix:{path}")
    most = num_connections(options.max_connections)
    gate = GrpcGate(
        GateOptions(path, options.max_body + _ENVELOPE, options.body_seconds, header),
        Admission(most, max(1, most // 2), "connections"),
        count_handshakes(),
    )
    return GrpcServer(options, service, gate, server)


def _sockets(options: FrontOptions) -> list[socket.socket]:
    """Those that were inherited, or new ones."""
    if given := options.sockets.get("grpc"):
        return [socket.socket(fileno=number) for number in given]
    try:
        return open_port(options.host, options.ports.grpc)
    except OSError as error:
        where = f"--grpc-port {options.ports.grpc} on {options.host}"
        raise EnvironmentProblem(f"{where}: {error.strerror or error}") from error


def server_context(options: FrontOptions) -> ssl.SSLContext:
    """The encryption of the port.

    Raises:
        ConfigError: when a file can't be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    try:
        context.load_cert_chain(options.tls_certificate, options.tls_key)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        files = f"--tls-certificate {options.tls_certificate}, --tls-key {options.tls_key}"
        raise ConfigError(f"{files}: {getattr(error, 'reason', None) or error}") from error
    return context


def _server_options(max_body: int, max_open: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_body + _ENVELOPE),
        ("grpc.max_send_message_length", -1),
        # A compressed message may unpack to a thousand times its size before its size is looked at.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.max_concurrent_streams", max_open + 16),  # of one connection
        ("grpc.max_metadata_size", 8192),
        ("grpc.absolute_max_metadata_size", 16384),
        ("grpc.http2.max_frame_size", MAX_FRAME),
        ("grpc.http2.bdp_probe", 0),  # it would raise the size of frames
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 60_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.max_connection_idle_ms", 600_000),
    ]


class _Doors(grpc.GenericRpcHandler):
    """Which calls there are. Others are UNIMPLEMENTED."""

    def __init__(self, service: GrpcService) -> None:
        self._handlers = {
            _HEALTH: service.health,
            f"/{SERVICE}/ModelInfer": service.infer,
            f"/{SERVICE}/ModelStreamInfer": service.infer_stream,
            **{f"/{SERVICE}/{name}": service.asker(name) for name in ASKED},
        }
        self._service = service

    def service(self, handler_call_details: Any) -> Any:
        """See grpc.GenericRpcHandler."""
        path = handler_call_details.method
        behavior = self._handlers.get(path)
        if behavior is None:
            return None
        name = path.rpartition("/")[2]
        # All take streams, and on the wire there is no other: so the time for a message to arrive can be limited.
        streams = name == "ModelStreamInfer"
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        return make(self._service.guarded(name, behavior))
