"""The process of the OpenAI-compatible endpoint: `python -m oarlock.serve.openai_process JSON`, started by run.py."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from oarlock.errors import ConfigError
from oarlock.serve.openai_api import ApiOptions, make_app


def read_keys(path: Path) -> tuple[str, ...]:
    """API keys of a file, one a line; empty lines and those that begin with # are left out.

    Raises:
        ConfigError: when there is none, or one that no header can carry.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--api-key-file {path}: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"--api-key-file {path}: no key in this file (one a line)")
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"--api-key-file {path}: a key may have printable ASCII characters, no spaces")
    return keys


def command(options: ApiOptions, host: str, port: int, drain_seconds: float, key_file: Path | None) -> list[str]:
    """The words that start it; keys stay in their file."""
    told: dict[str, Any] = dataclasses.asdict(options) | {
        "keys": [],
        "key_file": str(key_file or ""),
        "host": host,
        "port": port,
        "drain_seconds": drain_seconds,
    }
    return [sys.executable, "-m", "oarlock.serve.openai_process", json.dumps(told)]


def main(told: dict[str, Any]) -> None:
    """Serve until SIGTERM; then answer what is open, `drain_seconds` at most."""
    import uvicorn

    host, port, drain = told.pop("host"), told.pop("port"), told.pop("drain_seconds")
    key_file = told.pop("key_file")
    told["keys"] = read_keys(Path(key_file)) if key_file else ()
    uvicorn.run(
        make_app(ApiOptions(**told)),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=max(1, round(drain)),
        timeout_keep_alive=5,
        h11_max_incomplete_event_size=65536,
        server_header=False,
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
