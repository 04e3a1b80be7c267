"""`oarlock serve`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from oarlock.environment.console import get_logger
from oarlock.errors import ConfigError
from oarlock.files import holds_adapter, keep_private
from oarlock.serve.engine.limits import Settings
from oarlock.serve.engine.prompts import PARSINGS
from oarlock.serve.front.keys import KeySource, take_keys_of_environment
from oarlock.serve.front.options import Ports
from oarlock.serve.front.tls import check_certificate
from oarlock.serve.options import ServeOptions
from oarlock.serve.supervision.process_output import lossy_output

logger = get_logger(__name__)

Adder = Callable[..., argparse.ArgumentParser]


_GONE = {
    "--triton-host": "Triton has no port any more: --host is the address of all four",
    "--admin-key-file": "models are loaded by `oarlock admin reload`, through a socket of the server's own user",
}


class _Gone(argparse.Action):
    """A flag of an earlier version: its use is an error that says what took its place."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        parser.error(f"{self.option_strings[0]}: {self.const}")


def add_serve(commands: Any, command: Adder) -> None:
    """The serve subcommand."""
    serve = command(commands, "serve", "Serve a model with Triton: OpenAI's interface, REST and gRPC.", _serve)
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
    where.add_argument("--port", type=int, default=8080, help="of the OpenAI-compatible endpoint (default: 8080)")
    where.add_argument("--rest-port", type=int, default=8000, metavar="PORT", help="of REST, KServe v2 (default: 8000)")
    where.add_argument("--grpc-port", type=int, default=8001, metavar="PORT", help="of gRPC, KServe v2 (default: 8001)")
    where.add_argument("--metrics-port", type=int, default=8002, metavar="PORT", help="of Prometheus (default: 8002)")
    for flag, instead in _GONE.items():
        where.add_argument(flag, action=_Gone, help=argparse.SUPPRESS, const=instead)
    guard = serve.add_argument_group("who may ask")
    guard.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="keys, one a line; every request needs one. Read again on SIGHUP. Keys in the variable OARLOCK_API_KEYS "
        "are valid too",
    )
    guard.add_argument("--tls-certificate", type=Path, metavar="FILE", help="PEM; encrypts all ports (with --tls-key)")
    guard.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM, without a passphrase")
    guard.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name or address by which clients reach the server (repeatable)",
    )
    guard.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin of a web page that may ask, such as https://chat.example.com (repeatable; default: none)",
    )
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
    limits.add_argument(
        "--max-open",
        type=int,
        default=0,
        metavar="N",
        help="open requests over all ports; further ones get 429 (default: 2 x (--max-batch + --max-queue))",
    )
    limits.add_argument(
        "--max-open-per-client",
        type=int,
        default=0,
        metavar="N",
        help="the same for one client: a key, or an address where there are no keys (default: --max-batch + "
        "--max-queue)",
    )
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
    life.add_argument("--verbose", action="store_true", help="print all that Triton logs")


def _serve(arguments: argparse.Namespace) -> int:
    keep_private()
    # It asks a running server for its keys, and would end one that still exports, which leaves the export behind.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with lossy_output():
        return _serve_folder(arguments)


def _serve_folder(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.folder)
    options = _options(folder, arguments)
    adapters = _adapters(arguments.adapter)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder")
    if not adapters and holds_adapter(folder):
        return _serve_adapter(folder, options)
    if not (folder / "config.json").is_file():
        if adapters:
            raise ConfigError("--adapter goes with a model folder; an export has its adapters inside")
        return _run(options)
    logger.info(f"{folder} is a model folder: exporting it for Triton first")
    return _serve_model(folder, adapters, options)


def _options(folder: Path, arguments: argparse.Namespace) -> ServeOptions:
    """The options, checked as far as possible before a model is exported or loaded."""
    given = {item.name: getattr(arguments, item.name) for item in fields(Settings)}
    limits = {name: value for name, value in given.items() if value is not None}
    Settings(**limits)  # refuses what is out of range
    for flag, value in (
        ("--max-open", arguments.max_open),
        ("--max-open-per-client", arguments.max_open_per_client),
        ("--start-seconds", arguments.start_seconds),
        ("--drain-seconds", arguments.drain_seconds),
    ):
        if not 0 <= value < 1 << 31:
            raise ConfigError(f"{flag} {value:g}: it has to be from 0 to {(1 << 31) - 1:,}")
    if (arguments.tls_certificate is None) != (arguments.tls_key is None):
        raise ConfigError("--tls-certificate and --tls-key go together")
    if arguments.tls_certificate is not None:
        check_certificate(arguments.tls_certificate, arguments.tls_key)
    keys = KeySource(arguments.api_key_file, take_keys_of_environment())
    keys.read()
    return ServeOptions(
        repository=folder,
        host=arguments.host,
        ports=Ports(arguments.grpc_port, arguments.rest_port, arguments.metrics_port, arguments.port),
        limits=limits,
        max_open=arguments.max_open,
        max_open_per_client=arguments.max_open_per_client,
        allowed_hosts=tuple(arguments.allowed_host),
        cors_origins=tuple(arguments.cors_origin),
        keys=keys,
        tls_certificate=arguments.tls_certificate,
        tls_key=arguments.tls_key,
        start_seconds=arguments.start_seconds,
        drain_seconds=arguments.drain_seconds,
        verbose=arguments.verbose,
    )


def _serve_adapter(folder: Path, options: ServeOptions) -> int:
    """An adapter alone, beside its base; both are asked with the tokenizer and the template of the training."""
    from oarlock.peft.adapter_base import find_base, with_texts_of
    from oarlock.peft.open_adapter import open_lora

    found, name = open_lora(folder, "served"), folder.resolve().name
    base = find_base(found, f"Name it: oarlock serve BASE --adapter {name}={folder}")
    logger.info(f"{folder} is an adapter of {base}: exporting both for Triton first; ask for model {name!r}")
    with tempfile.TemporaryDirectory(prefix="oarlock-serve-") as place:
        return _serve_model(with_texts_of(folder, base, Path(place)), {name: folder}, options, near=base)


def _serve_model(folder: Path, adapters: dict[str, Path], options: ServeOptions, near: Path | None = None) -> int:
    """Serve an export that is made for it, and deleted afterwards."""
    from oarlock.export.triton import export_triton

    where = _near(near or folder)
    with tempfile.TemporaryDirectory(prefix=".oarlock-serve-", dir=where, ignore_cleanup_errors=True) as name:
        place = Path(name)
        exported = _state_of(folder, adapters)

        def export_if_changed() -> None:
            nonlocal exported
            now = _state_of(folder, adapters)
            if now == exported:
                return
            new, old = place / "new", place / "old"
            shutil.rmtree(new, ignore_errors=True)  # of an export that failed
            export_triton(folder, adapters, new)
            (place / "repository").rename(old)
            new.rename(place / "repository")
            shutil.rmtree(old, ignore_errors=True)
            exported = now

        export_triton(folder, adapters, place / "repository")
        return _run(
            dataclasses.replace(options, repository=place / "repository", temporary=place, refresh=export_if_changed)
        )


def _state_of(folder: Path, adapters: Mapping[str, Path]) -> list[tuple[str, int, int]]:
    """By which a change of the files in a model's and its adapters' folders is seen."""
    found = []
    for place in (folder, *adapters.values()):
        for path in sorted(place.glob("*")):
            if path.is_file():
                state = path.stat()
                found.append((str(path), state.st_mtime_ns, state.st_size))
    return found


def _run(options: ServeOptions) -> int:
    from oarlock.serve.packages import check_installed

    check_installed()
    from oarlock.serve.run import serve

    return serve(options)


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
