"""Collecting the problems of a configuration, so one error lists all of them, with suggestions for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from oarlock.config.options import OptionSpec
from oarlock.config.synonyms import explain_name
from oarlock.errors import ConfigError

_MOST = 50  # problems; a file with more is not a configuration
_LONGEST = 2000  # characters of one problem
_LONGEST_NAME = 64  # characters; the longest option has 35


class WrongOptions(ConfigError):
    """Unknown options, or options with invalid values."""


class Problems(list[str]):
    """Descriptions of problems."""

    def append(self, problem: str) -> None:
        """Add a problem.

        Raises:
            WrongOptions: there are too many.
        """
        super().append(problem)
        if len(self) >= _MOST:
            raise WrongOptions(f"{listing(self)}\n  - stopped after these")


def listing(problems: list[str]) -> str:
    """All problems in one message. Long ones are truncated."""
    problems = [text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..." for text in problems]
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the configuration:\n" + "\n".join(f"  - {problem}" for problem in problems)


def suggest(name: str, value: Any, known: Iterable[str], specs: dict[str, OptionSpec], prefix: str = "") -> str:
    """Suggest what an unknown name means: an option with that name in other suites, or the most similar name."""
    if len(name) > _LONGEST_NAME:
        return ""
    if found := explain_name(name, value, specs.keys(), as_flags=bool(prefix)):
        return f": {found}"
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def map_spellings(specs: dict[str, OptionSpec]) -> dict[str, str]:
    """Every accepted spelling -> option name."""
    return {alias: name for name, spec in specs.items() for alias in (name, *spec.aliases)}
