"""What the front of the server is told by the process that starts it, and what changes while it runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Ports:
    """Where the server listens."""

    grpc: int = 8001
    rest: int = 8000
    metrics: int = 8002
    openai: int = 8080


@dataclass(frozen=True)
class FrontOptions:
    """How the front listens, whom it asks, and what it lets through.

    Attributes:
        host: address of all four ports.
        sockets: descriptors of the listening sockets of the ports (openai, rest, grpc, metrics), inherited, so that
            connections wait while the front is started again.
        run: the folder of this server, in which the front says that its ports are open; "" for nowhere.
        triton_grpc: where Triton's gRPC is, as grpcio writes it (unix:PATH).
        triton_metrics: path of the Unix socket with Triton's metrics.
        model: the streaming model, which has the engine.
        models: all that clients may ask, `model` among them.
        temperature: of OpenAI's requests that name none.
        max_body: bytes of a request.
        max_tokens: of an answer.
        timeout: seconds for a request.
        body_seconds: from the first to the last byte of a request.
        max_open: requests that may be open; further ones get 429.
        max_open_per_client: the same, of one client address.
        max_connections: open connections of one HTTP port.
        allowed_hosts: names that requests may be addressed to, beside the server's own.
        cors_origins: web pages (scheme://host:port) that may ask; none by default.
        keys: API keys, any of which a request has to bring; empty for none.
        tls_certificate, tls_key: files in PEM; "" for no encryption.
        drain_seconds: for requests in flight when it is told to stop.
        restarts: how often each part of the server has been started again.
    """

    triton_grpc: str
    triton_metrics: str
    model: str
    models: tuple[str, ...]
    host: str = "127.0.0.1"
    ports: Ports = field(default_factory=Ports)
    sockets: Mapping[str, Sequence[int]] = field(default_factory=dict)
    run: str = ""
    temperature: float = 1.0
    max_body: int = 1 << 20
    max_tokens: int = 4096
    timeout: float = 600.0
    body_seconds: float = 30.0
    max_open: int = 544
    max_open_per_client: int = 272
    max_connections: int = 2000
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    keys: tuple[str, ...] = field(default=(), repr=False)
    tls_certificate: str = ""
    tls_key: str = ""
    drain_seconds: float = 30.0
    restarts: Mapping[str, int] = field(default_factory=dict)

    @property
    def has_tls(self) -> bool:
        """Whether all ports are encrypted."""
        return bool(self.tls_certificate)

    @property
    def is_local(self) -> bool:
        """Whether this machine alone reaches the ports."""
        return self.host in LOOPBACK

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> FrontOptions:
        """What to_json() wrote."""
        told: dict[str, Any] = json.loads(text)
        told["ports"] = Ports(**told["ports"])
        for name in ("models", "allowed_hosts", "cors_origins", "keys"):
            told[name] = tuple(told[name])
        return cls(**told)


@dataclass
class FrontState:
    """What the first process tells while the front runs.

    Attributes:
        restarts: how often each part (triton, front, guardian) has been started again.
        draining: whether the server is about to end, so that it takes no further requests.
    """

    restarts: dict[str, int] = field(default_factory=dict)
    draining: bool = False
