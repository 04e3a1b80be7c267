"""What `oarlock serve` is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oarlock.serve.front.keys import KeySource
from oarlock.serve.front.options import Ports


@dataclass(frozen=True)
class ServeOptions:
    """What `oarlock serve` is told.

    Attributes:
        repository: model repository of `oarlock export --target triton`.
        host: address that all ports are opened on.
        limits: of requests, over those of the repository (fields of Settings).
        max_open: requests that may be open, over all ports; 0 for twice what the model takes.
        max_open_per_client: the same of one client; 0 for what the model takes.
        allowed_hosts: names that requests may be addressed to, beside the server's own.
        cors_origins: web pages that may ask.
        keys: where API keys come from.
        tls_certificate, tls_key: files in PEM.
        temporary: a folder that is removed when the server ends, however that comes.
        refresh: brings the repository up to date with what it was made from, before a model is loaded anew.
        start_seconds: for loading the model.
        drain_seconds: for requests in flight when it is told to stop.
    """

    repository: Path
    host: str = "127.0.0.1"
    ports: Ports = field(default_factory=Ports)
    limits: Mapping[str, Any] = field(default_factory=dict)
    max_open: int = 0
    max_open_per_client: int = 0
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    keys: KeySource = field(default_factory=KeySource)
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    temporary: Path | None = None
    refresh: Callable[[], None] | None = None
    start_seconds: float = 600.0
    drain_seconds: float = 30.0
    verbose: bool = False
