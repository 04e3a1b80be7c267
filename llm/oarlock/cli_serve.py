"""`oarlock serve`."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from oarlock.environment import say
from oarlock.errors import ConfigError
from oarlock.files import holds_adapter
from oarlock.serve.prompts import PARSINGS
from oarlock.serve.settings import Settings

Adder = Callable[..., argparse.ArgumentParser]


def add_serve(commands: Any, command: Adder) -> None:
    """The serve subcommand."""
    serve = command(
        commands, "serve", "Serve a model: Triton (gRPC, REST) and an OpenAI-compatible endpoint beside it.", _serve
    )
    serve.add_argument(
        "folder", metavar="DIR", help="export of `--target triton`, model folder, or LoRA adapter folder"
    )
    serve.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="LoRA adapter beside a model (repeatable)",
    )
    where = serve.add_argument_group("where it listens")
    where.add_argument("--host", default="127.0.0.1", help="address to open all ports on (default: this machine alone)")
    where.add_argument(
        "--triton-host",
        default="",
        metavar="HOST",
        help="of Triton's ports (default: --host; with keys 127.0.0.1)",
    )
    where.add_argument("--port", type=int, default=8080, help="of the OpenAI-compatible endpoint (default: 8080)")
    where.add_argument("--rest-port", type=int, default=8000, metavar="PORT", help="of Triton (default: 8000)")
    where.add_argument("--grpc-port", type=int, default=8001, metavar="PORT", help="of Triton (default: 8001)")
    where.add_argument("--metrics-port", type=int, default=8002, metavar="PORT", help="of Triton (default: 8002)")
    where.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys for the OpenAI side, one a line")
    where.add_argument("--admin-key-file", type=Path, metavar="FILE", help="key for loading models in Triton")
    limits = serve.add_argument_group("limits of requests (default: those of the export's config.pbtxt)")
    for flag, kind, text in (
        ("--max-batch", int, "requests that are answered at a time"),
        ("--max-queue", int, "requests that wait"),
        ("--max-tokens", int, "tokens of an answer"),
        ("--max-length", int, "tokens of a prompt and its answer (0: the model's context)"),
        ("--max-body", int, "bytes of a request"),
        ("--timeout", float, "seconds for a request"),
    ):
        limits.add_argument(flag, type=kind, metavar="N", help=text)
    serve.add_argument(
        "--parse-special-tokens",
        choices=PARSINGS,
        help="where the spelling of a special token in a client's text is that token: in raw prompts (default), in "
        "messages too, or nowhere",
    )
    life = serve.add_argument_group("start and stop")
    life.add_argument("--start-seconds", type=float, default=600.0, metavar="S", help="for loading (default: 600)")
    life.add_argument(
        "--drain-seconds", type=float, default=30.0, metavar="S", help="for requests in flight at the end (default: 30)"
    )
    life.add_argument("--verbose", action="store_true", help="all that Triton says")


def _serve(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.folder)
    given = {item.name: getattr(arguments, item.name) for item in fields(Settings)}
    limits = {name: value for name, value in given.items() if value is not None}
    Settings(**limits)  # refuses what is out of range
    adapters = _adapters(arguments.adapter)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder")
    if not adapters and holds_adapter(folder):
        return _serve_adapter(folder, limits, arguments)
    if not (folder / "config.json").is_file():
        if adapters:
            raise ConfigError("--adapter goes with a model folder; an export has its adapters inside")
        return _run(folder, limits, arguments)
    say(f"{folder} is a model folder: exporting it for Triton first")
    return _serve_model(folder, adapters, limits, arguments)


def _serve_adapter(folder: Path, limits: dict[str, Any], arguments: argparse.Namespace) -> int:
    """An adapter alone, beside its base; both are asked with the tokenizer and the template of the training."""
    from oarlock.models.adapter_base import find_base, with_texts_of
    from oarlock.models.open_adapter import open_lora

    found, name = open_lora(folder, "served"), folder.resolve().name
    base = find_base(found, f"Name it: oarlock serve BASE --adapter {name}={folder}")
    say(f"{folder} is an adapter of {base}: exporting both for Triton first; ask for model {name!r}")
    with tempfile.TemporaryDirectory(prefix="oarlock-serve-") as place:
        return _serve_model(with_texts_of(folder, base, Path(place)), {name: folder}, limits, arguments, near=base)


def _serve_model(
    folder: Path,
    adapters: dict[str, Path],
    limits: dict[str, Any],
    arguments: argparse.Namespace,
    near: Path | None = None,
) -> int:
    """Serve an export that is made for it, and deleted afterwards."""
    from oarlock.export.triton import export_triton

    where = _near(near or folder)
    with tempfile.TemporaryDirectory(prefix=".oarlock-serve-", dir=where, ignore_cleanup_errors=True) as name:
        place = Path(name)
        export_triton(folder, adapters, place / "repository")
        return _run(place / "repository", limits, arguments, place)


def _run(repository: Path, limits: dict[str, Any], arguments: argparse.Namespace, temporary: Path | None = None) -> int:
    from oarlock.serve.installed import check_installed

    check_installed()
    from oarlock.serve.options import ServeOptions
    from oarlock.serve.run import serve
    from oarlock.serve.triton_server import Ports

    return serve(
        ServeOptions(
            repository=repository,
            host=arguments.host,
            triton_host=arguments.triton_host,
            ports=Ports(arguments.grpc_port, arguments.rest_port, arguments.metrics_port, arguments.port),
            limits=limits,
            api_key_file=arguments.api_key_file,
            admin_key_file=arguments.admin_key_file,
            temporary=temporary,
            start_seconds=arguments.start_seconds,
            drain_seconds=arguments.drain_seconds,
            verbose=arguments.verbose,
        )
    )


def _adapters(words: list[str]) -> dict[str, Path]:
    found = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"--adapter {word}: it has to be NAME=DIR")
        found[name] = Path(folder)
    return found


def _near(folder: Path) -> Path:
    """A place on the same disk, where weights need no copy; else wherever temporary files go."""
    parent = folder.resolve().parent
    return parent if os.access(parent, os.W_OK) else Path(tempfile.gettempdir())
