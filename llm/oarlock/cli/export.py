"""`oarlock export`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oarlock.cli.weights import add_weight_flags
from oarlock.environment.console import get_logger
from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level
from oarlock.errors import EXIT_FAILED, ConfigError
from oarlock.export.servers import SERVERS, TARGETS, TRITON

logger = get_logger(__name__)

Adder = Callable[..., argparse.ArgumentParser]


def add_export(commands: Any, command: Adder) -> None:
    """The export subcommand."""
    export = command(
        commands, "export", "Write a directory that a server reads, proven equal to the model; or check one.", _export
    )
    export.add_argument("--model", metavar="DIR", default="", help="model folder; default: the base of the adapter")
    export.add_argument(
        "--adapter",
        metavar="DIR",
        action="append",
        default=[],
        help="LoRA adapter, merged first (triton and peft take it as it is; repeatable)",
    )
    export.add_argument("--target", choices=TARGETS, help="what will read the directory")
    export.add_argument("--output", metavar="DIR", help="folder that does not exist yet")
    export.add_argument("--name", default="oarlock", help="what clients call the model (default: oarlock)")
    add_weight_flags(export, "the model")
    export.add_argument(
        "--keep-adapter", "--keep_adapter", action="store_true", help="vllm: adapters beside the model, not merged"
    )
    export.add_argument("--check", metavar="DIR", help="check a directory in place of writing one")
    export.add_argument("--server", choices=(*SERVERS, TRITON), help="by whose rules (default: its target's)")
    export.add_argument("--hashes", action="store_true", help="with --check: compare every file with the manifest")


def _export(arguments: argparse.Namespace) -> int:
    if arguments.check:
        return _check(arguments)
    if arguments.server or arguments.hashes:
        raise ConfigError("--server and --hashes are for --check DIR")
    if not (arguments.target and arguments.output):
        raise ConfigError(f"--target ({', '.join(TARGETS)}) and --output DIR are missing, or --check DIR")
    from oarlock.export.request import Request, check_options, check_source
    from oarlock.formats.links import check_links
    from oarlock.merge.inputs import AdapterMix

    request = Request(
        target=arguments.target,
        model=arguments.model,
        output=Path(arguments.output),
        adapters=tuple(map(Path, arguments.adapter)),
        name=arguments.name,
        dtype=arguments.dtype,
        max_shard_bytes=arguments.shard_bytes,
        proof=not arguments.no_proof,
        allow_pickle=arguments.allow_pickle_weights,
        keep_adapters=arguments.keep_adapter,
    )
    check_options(request)
    if request.adapters:
        AdapterMix.open(request.adapters)
    if Path(request.model).is_dir() and request.model:
        check_links(request.model)
        check_source(request, Path(request.model))
    import_paddle()
    set_paddlenlp_log_level("error")
    from oarlock.export.export import export

    export(request)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    if arguments.target or arguments.output or arguments.model or arguments.adapter:
        raise ConfigError("--check DIR looks at a directory and goes with --server and --hashes alone")
    from oarlock.export.checks.check import check_folder, guess_server

    folder = Path(arguments.check)
    server = arguments.server or guess_server(folder)
    if not folder.is_dir():
        raise ConfigError(f"--check {folder}: no such folder")
    import_paddle()
    set_paddlenlp_log_level("error")
    findings = check_folder(folder, server, arguments.hashes)
    for finding in findings:
        print(finding.text())
    many = f"{len(findings)} thing{'s' * (len(findings) != 1)} would go wrong" if findings else "nothing found"
    logger.info(f"{folder}, by the rules of {server}: {many}")
    return EXIT_FAILED if findings else 0
