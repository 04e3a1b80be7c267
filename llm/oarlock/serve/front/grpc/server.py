"""The gRPC port: its limits, its encryption, and its calls, which service.py implements."""

from __future__ import annotations

import os
import secrets
import socket
import ssl
from collections.abc import Sequence
from typing import Any

import grpc

from oarlock.errors import ConfigError, EnvironmentProblem
from oarlock.serve.config import FrontConfig, ServeConfig
from oarlock.serve.front.admission import Admission
from oarlock.serve.front.grpc.gate import GateOptions, GrpcGate
from oarlock.serve.front.grpc.http2_frames import MAX_FRAME
from oarlock.serve.front.grpc.service import QUERIES, GrpcService
from oarlock.serve.front.http.server import limit_connections
from oarlock.serve.front.http.tls_connections import count_handshakes
from oarlock.serve.front.keys import Keys
from oarlock.serve.front.metrics import FrontCounts
from oarlock.serve.supervision.listening import open_port
from oarlock.serve.triton.client import SERVICE, TritonClient

_HEALTH = "/grpc.health.v1.Health/Check"
_ENVELOPE = 16384  # bytes of a request besides the contents of its tensors


class GrpcServer:
    """The gate of the port, and gRPC's own server behind it."""

    def __init__(self, config: FrontConfig, gate: GrpcGate, server: grpc.aio.Server) -> None:
        self._config, self._gate, self._server = config, gate, server

    async def start(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Take calls.

        Args:
            sockets: listening sockets; None to open the port.

        Raises:
            ConfigError: when a file for TLS can't be used.
            EnvironmentProblem: when the port can't be opened.
        """
        config, tls = self._config, None
        if config.has_tls:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.minimum_version = ssl.TLSVersion.TLSv1_2
            tls.set_alpn_protocols(["h2"])
            try:
                tls.load_cert_chain(config.tls_certificate, config.tls_key)
            except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
                files = f"--tls-certificate {config.tls_certificate}, --tls-key {config.tls_key}"
                raise ConfigError(f"{files}: {getattr(error, 'reason', None) or error}") from error
        if not sockets:
            host, port = config.host, config.grpc_port
            try:
                sockets = open_port(host, port)
            except OSError as error:
                raise EnvironmentProblem(f"--grpc-port {port} on {host}: {error.strerror or error}") from error
        await self._server.start()
        await self._gate.start(sockets, tls)

    async def stop(self, grace: float | None = None) -> None:
        """Take no more calls. Open ones have `grace` seconds."""
        self._gate.close()
        await self._server.stop(grace)
        await self._gate.end()


def make_grpc_server(
    config: ServeConfig,
    triton: TritonClient,
    keys: Keys,
    admission: Admission,
    counts: FrontCounts | None = None,
) -> GrpcServer:
    """Make the gRPC port of a server."""
    header = f"oarlock-peer-{secrets.token_hex(8)}"
    service = GrpcService(config, triton, keys, admission, counts or FrontCounts(), header)
    max_message = config.engine.max_body + _ENVELOPE
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_message),
            ("grpc.max_send_message_length", -1),
            # A compressed message may grow to a thousand times its size before its size is checked.
            ("grpc.compression_enabled_algorithms_bitset", 1),
            ("grpc.max_concurrent_streams", config.max_open + 16),  # of one connection
            ("grpc.max_metadata_size", 8192),
            ("grpc.absolute_max_metadata_size", 16384),
            ("grpc.http2.max_frame_size", MAX_FRAME),
            ("grpc.http2.bdp_probe", 0),  # it would raise the size of frames
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 60_000),
            ("grpc.http2.max_ping_strikes", 2),
            ("grpc.max_connection_idle_ms", 600_000),
        ],
        maximum_concurrent_rpcs=config.front.max_connections,
        handlers=[_Calls(service)],
    )
    path = f"{config.triton.run}/front-grpc-{os.getpid()}"  # in a folder that only this user can open
    server.add_insecure_port(f"unix:{path}")
    most = limit_connections(config.front.max_connections)
    gate = GrpcGate(
        GateOptions(path, max_message, config.front.body_seconds, header),
        Admission(most, max(1, most // 2), "connections"),
        count_handshakes(),
    )
    return GrpcServer(config.front, gate, server)


class _Calls(grpc.GenericRpcHandler):
    """The calls of the port. Others are UNIMPLEMENTED."""

    def __init__(self, service: GrpcService) -> None:
        self._handlers = {
            _HEALTH: service.check_health,
            f"/{SERVICE}/ModelInfer": service.infer,
            f"/{SERVICE}/ModelStreamInfer": service.infer_stream,
            **{f"/{SERVICE}/{name}": service.make_query(name) for name in QUERIES},
        }
        self._service = service

    def service(self, handler_call_details: Any) -> Any:
        path = handler_call_details.method
        behavior = self._handlers.get(path)
        if behavior is None:
            return None
        name = path.rpartition("/")[2]
        # All take streams, which look the same on the wire. So the time for a message to arrive can be limited.
        streams = name == "ModelStreamInfer"
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        return make(self._service.guard(name, behavior))
