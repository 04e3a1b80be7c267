"""`oarlock checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass

from oarlock.cli.flags import Command, CommandGroup, flag, positional
from oarlock.cli.weight_flags import ShardSize
from oarlock.environment.console import get_logger
from oarlock.errors import EXIT_FAILED, CheckpointError, report

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Options of `oarlock checkpoint inspect`."""

    folder: str = positional(metavar="DIR")
    """Folder of the checkpoint."""
    tensors: bool = flag(False)
    """List every tensor and its shards."""


def _inspect(options: InspectOptions) -> int:
    from oarlock.train.checkpoint.inspect import describe_checkpoint

    print(describe_checkpoint(options.folder, options.tensors))
    return 0


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of `oarlock checkpoint verify`."""

    folder: tuple[str, ...] = positional(metavar="DIR")
    """Folders of checkpoints."""


def _verify(options: VerifyOptions) -> int:
    from oarlock.train.checkpoint.manifest import list_unlisted_files, verify

    damaged = 0
    for folder in options.folder:
        try:
            manifest = verify(folder)
            if more := list_unlisted_files(folder, manifest):
                raise CheckpointError(
                    f"{folder}: {', '.join(more)}: not in the manifest, so added after the checkpoint was written. All "
                    "other files are complete. No run reads the added files; delete them or move them away"
                )
        except CheckpointError as error:
            report(error)
            damaged += 1
            continue
        size = sum(entry["bytes"] for entry in manifest.files.values())
        logger.info(f"{folder}: complete ({len(manifest.files)} files, {size / 1e6:,.1f} MB, step {manifest.step:,})")
    return EXIT_FAILED if damaged else 0


@dataclass(frozen=True, kw_only=True)
class ConsolidateOptions(ShardSize):
    """Options of `oarlock checkpoint consolidate`."""

    folder: str = positional(metavar="DIR")
    """Folder of the checkpoint."""
    output: str = positional(metavar="OUTPUT")
    """Model folder to write. It must not exist yet."""
    verify: bool = flag(True)
    """Skip the checksums of the checkpoint."""


def _consolidate(options: ConsolidateOptions) -> int:
    from oarlock.train.checkpoint.inspect import consolidate

    consolidate(options.folder, options.output, options.shard_bytes, check=options.verify)
    return 0


COMMAND = CommandGroup(
    "checkpoint",
    "Inspect, verify and consolidate checkpoints.",
    (
        Command("inspect", "Describe a checkpoint and what is in it.", InspectOptions, _inspect),
        Command("verify", "Check every file of a checkpoint against its manifest.", VerifyOptions, _verify),
        Command(
            "consolidate",
            "Write the model of a checkpoint as one model folder, tensor by tensor.",
            ConsolidateOptions,
            _consolidate,
        ),
    ),
)
