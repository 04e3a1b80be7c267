"""What `oarlock serve` is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oarlock.serve.triton_server import Ports


@dataclass(frozen=True)
class ServeOptions:
    """What `oarlock serve` is told.

    Attributes:
        repository: model repository of `oarlock export --target triton`.
        host: address that all ports are opened on.
        triton_host: the same for Triton's; "" for `host`, but for loopback where API keys are asked for.
        temporary: a folder that is removed when the server ends, however that comes.
        start_seconds: for loading the model.
        drain_seconds: for requests in flight when it is told to stop.
    """

    repository: Path
    host: str = "127.0.0.1"
    triton_host: str = ""
    ports: Ports = field(default_factory=Ports)
    limits: Mapping[str, Any] = field(default_factory=dict)
    api_key_file: Path | None = None
    admin_key_file: Path | None = None
    temporary: Path | None = None
    start_seconds: float = 600.0
    drain_seconds: float = 30.0
    verbose: bool = False
