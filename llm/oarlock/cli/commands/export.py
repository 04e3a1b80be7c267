"""`oarlock export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from oarlock.api.models import check_export, export_model
from oarlock.cli.flags import Command, flag
from oarlock.cli.weight_flags import WeightFlags
from oarlock.environment.console import get_logger
from oarlock.errors import EXIT_FAILED, ConfigError
from oarlock.export.servers import SERVERS, TARGETS, TRITON

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportFlags(WeightFlags):
    """Options of `oarlock export`."""

    model: str = flag("", metavar="DIR")
    """Model folder or hub name. Default: the base of the adapter."""
    adapter: tuple[str, ...] = flag((), metavar="DIR")
    """LoRA adapter. It is merged into the model, except for triton and peft. Can be repeated."""
    target: str | None = flag(None, choices=TARGETS)
    """What will read the export."""
    output: Path | None = flag(None, metavar="DIR")
    """Folder to write. It must not exist yet."""
    name: str = flag("oarlock", metavar="NAME")
    """Name of the model for clients."""
    keep_adapter: bool = flag(False)
    """For vllm: export the adapters next to the model instead of merging them."""
    check: Path | None = flag(None, metavar="DIR")
    """Check an existing export instead of writing one."""
    server: str | None = flag(None, choices=(*SERVERS, TRITON))
    """With --check: the server whose rules apply. Default: the one it was exported for."""
    hashes: bool = flag(False)
    """With --check: compare every file with the manifest."""


def _run(options: ExportFlags) -> int:
    if options.check is not None:
        return _check(options, options.check)
    if options.server or options.hashes:
        raise ConfigError("--server and --hashes need --check DIR")
    if options.target is None or options.output is None:
        raise ConfigError(f"give --target ({', '.join(TARGETS)}) and --output DIR, or --check DIR")
    export_model(
        cast(Any, options.target),
        options.output,
        model=options.model,
        adapters=options.adapter,
        name=options.name,
        keep_adapters=options.keep_adapter,
        **options.to_arguments(),
    )
    return 0


def _check(options: ExportFlags, folder: Path) -> int:
    if options.target or options.output or options.model or options.adapter:
        raise ConfigError("--check DIR checks an existing export; only --server and --hashes go with it")
    from oarlock.export.checks.check import guess_server

    server = options.server or guess_server(folder)
    findings = check_export(folder, server, hashes=options.hashes)
    for finding in findings:
        print(finding.to_line())
    found = f"{len(findings)} problem{'s' * (len(findings) != 1)} found" if findings else "no problems found"
    logger.info(f"{folder}, checked by the rules of {server}: {found}")
    return EXIT_FAILED if findings else 0


COMMAND = Command(
    "export", "Write a folder that a server reads, and prove that it equals the model; or check one.", ExportFlags, _run
)
