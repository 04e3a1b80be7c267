"""The gRPC port: its limits, its encryption, and which calls there are (grpc_service.py has what they do)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc

from oarlock.errors import ConfigError, EnvironmentProblem
from oarlock.serve.front.admission import Admission
from oarlock.serve.front.grpc_service import ASKED, GrpcService
from oarlock.serve.front.keys import Keys
from oarlock.serve.front.metrics import FrontCounts
from oarlock.serve.front.options import FrontOptions
from oarlock.serve.front.upstream import SERVICE, Upstream

_HEALTH = "/grpc.health.v1.Health/Check"
_ENVELOPE = 16384  # bytes of a request beside the contents of its tensors


def make_grpc_server(
    options: FrontOptions,
    upstream: Upstream,
    keys: Keys,
    admission: Admission,
    counts: FrontCounts | None = None,
) -> grpc.aio.Server:
    """A server on the port of `options`; start() and stop() are the caller's.

    Raises:
        ConfigError: when a file for TLS can't be used.
        EnvironmentProblem: when the port can't be had.
    """
    server = grpc.aio.server(
        options=_server_options(options.max_body, options.max_open),
        maximum_concurrent_rpcs=options.max_connections,
        handlers=[_Doors(GrpcService(options, upstream, keys, admission, counts or FrontCounts()))],
    )
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{options.ports.grpc}"
    try:
        if options.has_tls:
            server.add_secure_port(address, _credentials(options))
        else:
            server.add_insecure_port(address)
    except RuntimeError as error:
        raise EnvironmentProblem(f"--grpc-port {options.ports.grpc} on {options.host}: can't be opened") from error
    return server


def _server_options(max_body: int, max_open: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_body + _ENVELOPE),
        ("grpc.max_send_message_length", -1),
        # A compressed message may unpack to a thousand times its size before its size is looked at.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.max_concurrent_streams", max_open + 16),  # of one connection
        ("grpc.max_metadata_size", 8192),
        ("grpc.absolute_max_metadata_size", 16384),
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 60_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.max_connection_idle_ms", 600_000),
    ]


def _credentials(options: FrontOptions) -> grpc.ServerCredentials:
    found = []
    for flag, name in (("--tls-key", options.tls_key), ("--tls-certificate", options.tls_certificate)):
        try:
            found.append(Path(name).read_bytes())
        except OSError as error:
            raise ConfigError(f"{flag} {name}: {error.strerror or error}") from error
    return grpc.ssl_server_credentials([(found[0], found[1])])


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
        # All as streams, and on the wire there is no other: so the time for a message to arrive can be limited.
        return grpc.stream_stream_rpc_method_handler(self._service.guarded(path.rpartition("/")[2], behavior))
