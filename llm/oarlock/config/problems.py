"""The problems of a configuration, collected so that one error lists them all, with the nearest known names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from oarlock.config.options import OptionSpec
from oarlock.config.synonyms import meaning
from oarlock.errors import ConfigError

_MOST = 50  # problems; who has more has another file in hand than a configuration
_LONGEST = 2000  # characters of one problem
_LONGEST_NAME = 64  # characters; the longest option has 35


class WrongOptions(ConfigError):
    """Options that are not there, or have values that they can't have."""


class Problems(list[str]):
    """Sentences about what is wrong."""

    def append(self, problem: str) -> None:
        """Add one.

        Raises:
            ConfigError: when there are so many that reading on makes no sense.
        """
        super().append(problem)
        if len(self) >= _MOST:
            raise WrongOptions(f"{listing(self)}\n  - reading stopped here")


def listing(problems: list[str]) -> str:
    """All of them in one message; what quotes a long value is cut."""
    problems = [text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..." for text in problems]
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the configuration:\n" + "\n".join(f"  - {problem}" for problem in problems)


def suggestion(name: str, value: Any, known: Iterable[str], specs: dict[str, OptionSpec], prefix: str = "") -> str:
    """What an unknown name probably means: what other suites call so, else the nearest name."""
    if len(name) > _LONGEST_NAME:
        return ""
    if found := meaning(name, value, specs.keys(), as_flags=bool(prefix)):
        return f": {found}"
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def names_of(specs: dict[str, OptionSpec]) -> dict[str, str]:
    """Every accepted spelling -> option name."""
    return {alias: name for name, spec in specs.items() for alias in (name, *spec.aliases)}
