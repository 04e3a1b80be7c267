"""`oarlock serve`."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from oarlock.cli.flags import Command, flag, positional
from oarlock.config.options import between
from oarlock.environment.console import get_logger
from oarlock.errors import ConfigError, EnvironmentProblem
from oarlock.files import holds_adapter, keep_private
from oarlock.serve.config import ENGINE_SETTINGS, PARSINGS, EngineConfig, FrontConfig, ServeConfig, TritonConfig
from oarlock.serve.front.keys import KeySource, take_keys_of_environment
from oarlock.serve.front.tls import check_certificate
from oarlock.serve.supervision.process_output import drop_unwritable_output

logger = get_logger(__name__)

_LISTEN, _ACCESS, _LIFE = "where it listens", "who may ask", "start and stop"
_REMOVED = {
    "triton_host": "Triton has no port any more: --host is the address of all four",
    "admin_key_file": "models are loaded by `oarlock admin reload`, through a socket of the server's own user",
}
_PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "grpc": "grpcio", "tritonclient": "tritonclient[grpc]"}
_NOT_NEGATIVE = between(0, (1 << 31) - 1)
_LIMITS = "limits of requests (default: those of the export's config.pbtxt)"


@dataclass(frozen=True, kw_only=True)
class ServeFlags:
    """Options of `oarlock serve`."""

    folder: Path = positional(metavar="DIR")
    """Export of `--target triton`, model folder, or LoRA adapter folder."""
    adapter: tuple[str, ...] = flag((), metavar="NAME=DIR")
    """LoRA adapter of a model folder. Can be repeated."""
    parse_special_tokens: str | None = flag(None, choices=PARSINGS)
    """Where special tokens that a client spells out become special tokens: in raw prompts (default), in messages too,
    or nowhere."""

    host: str = flag("127.0.0.1", group=_LISTEN, metavar="ADDRESS")
    """Address of all ports. The default is reachable from this machine only."""
    port: int = flag(8080, group=_LISTEN, metavar="PORT")
    """Port of the OpenAI-compatible endpoint."""
    rest_port: int = flag(8000, group=_LISTEN, metavar="PORT")
    """Port of REST (KServe v2)."""
    grpc_port: int = flag(8001, group=_LISTEN, metavar="PORT")
    """Port of gRPC (KServe v2)."""
    metrics_port: int = flag(8002, group=_LISTEN, metavar="PORT")
    """Port of the Prometheus metrics."""

    api_key_file: Path | None = flag(None, group=_ACCESS, metavar="FILE")
    """API keys, one per line. Every request then needs one. The file is read again on SIGHUP. Keys in the variable
    OARLOCK_API_KEYS are valid too."""
    tls_certificate: Path | None = flag(None, group=_ACCESS, metavar="FILE")
    """Certificate in PEM. Encrypts all ports; needs --tls-key."""
    tls_key: Path | None = flag(None, group=_ACCESS, metavar="FILE")
    """Key in PEM, without a passphrase."""
    allowed_host: tuple[str, ...] = flag((), group=_ACCESS, metavar="NAME")
    """Further name or address by which clients reach the server. Can be repeated."""
    cors_origin: tuple[str, ...] = flag((), group=_ACCESS, metavar="ORIGIN")
    """Origin of web pages that may send requests, such as https://chat.example.com. Can be repeated. Default: none."""

    max_batch: int | None = flag(None, group=_LIMITS)
    """Requests answered at a time."""
    max_queue: int | None = flag(None, group=_LIMITS)
    """Waiting requests."""
    max_tokens: int | None = flag(None, group=_LIMITS)
    """Tokens of an answer."""
    max_length: int | None = flag(None, group=_LIMITS)
    """Tokens of a prompt and its answer. 0: the model's context."""
    max_body: int | None = flag(None, group=_LIMITS)
    """Bytes of a request."""
    timeout: float | None = flag(None, group=_LIMITS)
    """Seconds for a request."""
    max_open: int = flag(0, _NOT_NEGATIVE, group=_LIMITS)
    """Open requests over all ports; further ones get 429. Default: 2 x (--max-batch + --max-queue)."""
    max_open_per_client: int = flag(0, _NOT_NEGATIVE, group=_LIMITS)
    """The same for one client, which is a key, or an address if there are no keys. Default: --max-batch +
    --max-queue."""

    start_seconds: float = flag(600.0, _NOT_NEGATIVE, group=_LIFE, metavar="S")
    """Seconds for loading the model."""
    drain_seconds: float = flag(30.0, _NOT_NEGATIVE, group=_LIFE, metavar="S")
    """Seconds for open requests when the server stops."""
    verbose: bool = flag(False, group=_LIFE)
    """Print everything that Triton logs."""


def _run(flags: ServeFlags) -> int:
    keep_private()
    # A running server reads its keys again on SIGHUP. Earlier the signal would end the program during the export.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with drop_unwritable_output():
        return _serve_folder(flags)


def _serve_folder(flags: ServeFlags) -> int:
    folder, (config, keys) = flags.folder, _configure(flags)
    adapters = {}
    for word in flags.adapter:
        name, equals, place = word.partition("=")
        if not (name and equals and place):
            raise ConfigError(f"--adapter {word}: must be NAME=DIR")
        adapters[name] = Path(place)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder")
    if not adapters and holds_adapter(folder):
        # The adapter and its base both use the tokenizer and the chat template of the training.
        from oarlock.peft.adapter_base import add_texts_of, find_base
        from oarlock.peft.open_adapter import open_lora

        found, name = open_lora(folder, "served"), folder.resolve().name
        base = find_base(found, f"Name it: oarlock serve BASE --adapter {name}={folder}")
        logger.info(f"{folder} is an adapter of {base}: exporting both for Triton first; ask for model {name!r}")
        with tempfile.TemporaryDirectory(prefix="oarlock-serve-") as texts:
            return _serve_model(add_texts_of(folder, base, Path(texts)), {name: folder}, config, keys, near=base)
    if not (folder / "config.json").is_file():
        if adapters:
            raise ConfigError("--adapter goes with a model folder; an export has its adapters inside")
        return _start(config, keys)
    logger.info(f"{folder} is a model folder: exporting it for Triton first")
    return _serve_model(folder, adapters, config, keys)


def _configure(flags: ServeFlags) -> tuple[ServeConfig, KeySource]:
    """The configuration, checked as far as possible before a model is exported or loaded."""
    settings = {name: value for name in ENGINE_SETTINGS if (value := getattr(flags, name)) is not None}
    EngineConfig(**settings).check()
    if (flags.tls_certificate is None) != (flags.tls_key is None):
        raise ConfigError("--tls-certificate and --tls-key go together")
    if flags.tls_certificate and flags.tls_key:
        check_certificate(flags.tls_certificate, flags.tls_key)
    keys = KeySource(flags.api_key_file, take_keys_of_environment())
    keys.read()
    config = ServeConfig(
        triton=TritonConfig(
            repository=str(flags.folder),
            settings=settings,
            start_seconds=flags.start_seconds,
            verbose=flags.verbose,
        ),
        front=FrontConfig(
            host=flags.host,
            openai_port=flags.port,
            rest_port=flags.rest_port,
            grpc_port=flags.grpc_port,
            metrics_port=flags.metrics_port,
            max_open=flags.max_open,
            max_open_per_client=flags.max_open_per_client,
            allowed_hosts=flags.allowed_host,
            cors_origins=flags.cors_origin,
            tls_certificate=str(flags.tls_certificate or ""),
            tls_key=str(flags.tls_key or ""),
        ),
        drain_seconds=flags.drain_seconds,
    )
    return config, keys


def _serve_model(
    folder: Path, adapters: dict[str, Path], config: ServeConfig, keys: KeySource, near: Path | None = None
) -> int:
    """Export a model folder, serve the export and delete it.

    Args:
        near: folder on whose disk the export goes if possible, so that weights need no copy. Default: the model's.
    """
    from oarlock.export.triton import export_triton

    where = (near or folder).resolve().parent
    if not os.access(where, os.W_OK):
        where = Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix=".oarlock-serve-", dir=where, ignore_cleanup_errors=True) as name:
        place = Path(name)
        exported = _list_files(folder, adapters)

        def export_if_changed() -> None:
            nonlocal exported
            now = _list_files(folder, adapters)
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
        triton = replace(config.triton, repository=str(place / "repository"))
        return _start(replace(config, triton=triton), keys, place, export_if_changed)


def _list_files(folder: Path, adapters: Mapping[str, Path]) -> list[tuple[str, int, int]]:
    """List the files of a model and its adapters with their times and sizes, which show changes."""
    found = []
    for place in (folder, *adapters.values()):
        for path in sorted(place.glob("*")):
            if path.is_file():
                state = path.stat()
                found.append((str(path), state.st_mtime_ns, state.st_size))
    return found


def _start(
    config: ServeConfig,
    keys: KeySource,
    temporary: Path | None = None,
    refresh: Callable[[], None] | None = None,
) -> int:
    missing = [package for module, package in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise EnvironmentProblem(f"{', '.join(missing)} not installed: pip install 'oarlock[serve]'")
    from oarlock.serve.run import serve

    return serve(config, keys, temporary, refresh)


COMMAND = Command("serve", "Serve a model with Triton: OpenAI's interface, REST and gRPC.", ServeFlags, _run, _REMOVED)
