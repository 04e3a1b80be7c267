"""`oarlock rehearse`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from oarlock.cli.flags import Command, flag, positional
from oarlock.environment.paddle_import import import_paddle
from oarlock.files import write_json


@dataclass(frozen=True, kw_only=True)
class RehearseOptions:
    """Options of `oarlock rehearse`."""

    ranks: int | None = flag(None)
    """Processes. Default: as many as the launcher flags of the command ask for."""
    steps: int = flag(5)
    """Optimizer steps."""
    keep: Path | None = flag(None, metavar="DIR")
    """Keep logs and reports in this folder."""
    json: Path | None = flag(None, metavar="FILE")
    """Also write the measurements as JSON."""
    words: tuple[str, ...] = positional((), metavar="...", takes_rest=True)
    """The launch command as it is, or a recipe with flags."""


def _run(options: RehearseOptions) -> int:
    from oarlock.parallel.launch_command import parse_command
    from oarlock.parallel.make_plan import make_plan

    words = options.words[1:] if options.words[:1] == ("--",) else options.words
    command = parse_command(words, options.ranks)
    make_plan(command.config, command.num_ranks)  # what it refuses needs no Paddle
    import_paddle(1)
    from oarlock.train.rehearsal.rehearse import rehearse
    from oarlock.train.rehearsal.report import format_report, to_json

    verdict = rehearse(command, options.steps, options.keep)
    print(format_report(verdict))
    if options.json:
        write_json(options.json, to_json(verdict))
    return 1 if verdict.problem else 0


COMMAND = Command(
    "rehearse",
    "Run a few steps of a plan on CPU ranks with a small model, and compare them with one process.",
    RehearseOptions,
    _run,
)
