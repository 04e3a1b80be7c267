"""`oarlock rehearse` and `oarlock checkpoint`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oarlock.cli.weights import add_shard_flag
from oarlock.environment.console import get_logger
from oarlock.environment.paddle_import import import_paddle
from oarlock.errors import EXIT_FAILED, CheckpointError, report
from oarlock.files import write_json

logger = get_logger(__name__)

Adder = Callable[..., argparse.ArgumentParser]


def add_rehearse(commands: Any, command: Adder) -> None:
    """The rehearse subcommand."""
    rehearse = command(
        commands,
        "rehearse",
        "Run a few steps of a plan on CPU ranks with a model of the same structure, beside one process.",
        _rehearse,
    )
    rehearse.add_argument("--ranks", type=int, help="processes (default: what the command's launcher flags say)")
    rehearse.add_argument("--steps", type=int, default=5, help="optimizer steps (default: 5)")
    rehearse.add_argument("--keep", metavar="DIR", help="keep logs and reports in this folder")
    rehearse.add_argument("--json", metavar="FILE", help="also write the measurements as JSON")
    rehearse.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="the launch command as it stands, or a .yaml configuration with flags",
    )


def _rehearse(arguments: argparse.Namespace) -> int:
    from oarlock.parallel.launch_command import parse_command
    from oarlock.parallel.make_plan import make_plan

    words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    command = parse_command(words, arguments.ranks)
    make_plan(command.config, command.num_ranks)  # what it refuses needs no Paddle
    import_paddle(1)
    from oarlock.train.rehearsal.rehearse import rehearse
    from oarlock.train.rehearsal.report import as_json, report_text

    verdict = rehearse(command, arguments.steps, Path(arguments.keep) if arguments.keep else None)
    print(report_text(verdict))
    if arguments.json:
        write_json(arguments.json, as_json(verdict))
    return 1 if verdict.problem else 0


def add_checkpoint(commands: Any, command: Adder) -> None:
    """The checkpoint subcommands."""
    checkpoint = commands.add_parser("checkpoint", help="look into, check and convert checkpoints")
    kinds = checkpoint.add_subparsers(title="checkpoint commands", metavar="COMMAND", required=True)
    inspect = command(kinds, "inspect", "Say what a checkpoint is and what is in it.", _inspect)
    inspect.add_argument("folder", metavar="DIR")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor and its pieces")
    verify = command(kinds, "verify", "Check every file of a checkpoint against its manifest.", _verify)
    verify.add_argument("folder", metavar="DIR", nargs="+")
    consolidate = command(
        kinds, "consolidate", "Make one model folder of a checkpoint, tensor by tensor.", _consolidate
    )
    consolidate.add_argument("folder", metavar="DIR")
    consolidate.add_argument("output", metavar="OUTPUT")
    add_shard_flag(consolidate)
    consolidate.add_argument("--no-verify", action="store_true", help="leave out the checksums of the checkpoint")


def _inspect(arguments: argparse.Namespace) -> int:
    from oarlock.train.checkpoint.inspect import inspect_text

    print(inspect_text(arguments.folder, arguments.tensors))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from oarlock.train.checkpoint.manifest import unlisted, verify

    damaged = 0
    for folder in arguments.folder:
        try:
            manifest = verify(folder)
            if more := unlisted(folder, manifest):
                raise CheckpointError(
                    f"{folder}: {', '.join(more)}: not in the manifest, so added after the checkpoint was written. The "
                    "rest is whole. No run reads these files; delete them, or keep them elsewhere"
                )
        except CheckpointError as error:
            report(error)
            damaged += 1
            continue
        size = sum(entry["bytes"] for entry in manifest.files.values())
        logger.info(f"{folder}: whole ({len(manifest.files)} files, {size / 1e6:,.1f} MB, step {manifest.step:,})")
    return EXIT_FAILED if damaged else 0


def _consolidate(arguments: argparse.Namespace) -> int:
    from oarlock.train.checkpoint.inspect import consolidate

    consolidate(arguments.folder, arguments.output, arguments.shard_bytes, check=not arguments.no_verify)
    return 0
