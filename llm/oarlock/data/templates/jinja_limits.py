"""Limits of a chat template: its steps, its time, and the size of its results.

A template comes with a model, and anybody may have written it. Jinja's sandbox protects the machine, but does not stop
endless loops or huge texts. Here each iteration, each call and all text are counted against a budget. This needs no
signals and no threads, so it works in any thread of a server.

"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_MAX_STEPS = 3_000_000
_MAX_SECONDS = 4  # CPU time of this thread, so that the load of the machine does not matter
_MAX_SIZE = 1 << 24  # characters of a text, or items of a list
_MAX_SIZE_PER_GIVEN = 16  # more per character of the messages
_MAX_WORK = 1 << 28  # characters of all texts in total
_MAX_WORK_PER_GIVEN = 256
_MAX_DEPTH = 100
_MAX_INDENT = 100  # spaces, of `tojson`
_MAX_BITS = 1 << 16  # of an integer


class OverBudget(Exception):
    """A template exceeds its limits."""


class RenderBudget:
    """The remaining budget of one rendering.

    Args:
        given: number of characters of the messages.
    """

    def __init__(self, given: int) -> None:
        self.max_size = _MAX_SIZE + _MAX_SIZE_PER_GIVEN * given
        self._work = _MAX_WORK + _MAX_WORK_PER_GIVEN * given
        self._steps = _MAX_STEPS
        self._deadline = time.thread_time() + _MAX_SECONDS

    def step(self) -> None:
        """Count an iteration of a loop, or a call."""
        self._steps -= 1
        if self._steps < 0:
            raise OverBudget(f"it takes more than {_MAX_STEPS:,} steps")
        if self._steps % 256 == 0 and time.thread_time() > self._deadline:
            raise OverBudget(f"it takes more than {_MAX_SECONDS} seconds")

    def allow(self, size: int) -> None:
        """Refuse a text or list that would be too large."""
        if size > self.max_size:
            raise OverBudget(f"it makes a text or list of more than {self.max_size:,} characters or items")

    def charge(self, size: int) -> None:
        """Count a text or list that was made."""
        self.allow(size)
        self._work -= size
        if self._work < 0:
            raise OverBudget("it makes too much text")


_BUDGET: ContextVar[RenderBudget | None] = ContextVar("template_budget", default=None)


def get_budget() -> RenderBudget:
    """Return the budget of the current rendering. At compile time, each constant expression gets a new one."""
    return _BUDGET.get() or RenderBudget(0)


@contextmanager
def start_budget(given: int) -> Iterator[RenderBudget]:
    """Set the budget for rendering messages of `given` characters."""
    token = _BUDGET.set(RenderBudget(given))
    try:
        yield get_budget()
    finally:
        _BUDGET.reset(token)


class Steps:
    """An iterable that counts its iterations."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        run = get_budget()
        for item in self._items:
            run.step()
            yield item


def charge_value(value: Any) -> Any:
    """Charge the budget for a value that has a size, and return the value."""
    if isinstance(value, (str, list, tuple)):
        get_budget().charge(len(value))
    return value


def format_size(value: Any) -> int:
    """Estimate the number of characters of a value as text.

    Raises:
        OverBudget: if it is too large. The text is not made.
    """
    run, left = get_budget(), [0]

    def add(part: Any, depth: int) -> None:
        left[0] += len(part) if isinstance(part, str) else 8
        run.allow(left[0])
        if depth > _MAX_DEPTH:
            raise OverBudget(f"it nests values more than {_MAX_DEPTH} deep")
        if isinstance(part, Mapping):
            for key, inner in part.items():
                add(key, depth + 1)
                add(inner, depth + 1)
        elif isinstance(part, (list, tuple, set, frozenset)):
            for inner in part:
                add(inner, depth + 1)

    add(value, 0)
    return left[0]


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be too large."""
    run = get_budget()
    numbers = [value for value in (left, right) if isinstance(value, int)]
    if operator == "+":
        if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            run.charge(len(left) + len(right))
    elif operator == "*":
        sized = [value for value in (left, right) if isinstance(value, (str, list, tuple))]
        if sized and numbers:
            run.charge(len(sized[0]) * max(0, numbers[0]))
        elif len(numbers) == 2:
            _allow_bits(left.bit_length() + right.bit_length())
    elif operator == "**":
        if len(numbers) == 2:
            _allow_bits(left.bit_length() * max(0, right))
    elif operator == "%" and isinstance(left, str):
        run.charge(_bound_formatted(left, "%", right if isinstance(right, (tuple, Mapping)) else (right,)))


def _allow_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise OverBudget(f"it makes an integer of more than {_MAX_BITS:,} bits")


def _bound_formatted(pattern: str, mark: str, values: Iterable[Any] | Mapping[Any, Any]) -> int:
    """Return an upper bound of the number of characters of a formatted text."""
    values = list(values.values() if isinstance(values, Mapping) else values)
    widths = [*map(int, re.findall(r"\d{1,18}", pattern)), *(abs(v) for v in values if isinstance(v, int))]
    return len(pattern) + pattern.count(mark) * (max(widths, default=0) + sum(map(format_size, values)))


def check_call(text: str, method: str, args: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Check a call of a str method, or of the filter of the same name, and return the arguments to call it with.

    Raises:
        OverBudget: if the result would be too large.
    """
    run, given = get_budget(), [*args, *named.values()]
    numbers = [abs(value) for value in given if isinstance(value, int)]
    if method in ("center", "ljust", "rjust", "zfill"):
        run.allow(max(numbers, default=0))
    elif method == "expandtabs":
        run.allow(text.count("\t") * max(numbers, default=8))
    elif method == "indent":
        width = max([*numbers, *(len(value) for value in given if isinstance(value, str)), 4])
        run.allow(len(text) + (text.count("\n") + 1) * width)
    elif method == "replace" and len(given) > 1 and isinstance(given[0], str) and isinstance(given[1], str):
        run.allow(len(text) + text.count(given[0]) * len(given[1]))
    elif method == "translate" and given and isinstance(given[0], Mapping):
        run.allow(len(text) * max([1, *(len(v) for v in given[0].values() if isinstance(v, str))]))
    elif method in ("format", "format_map"):
        values = given[0] if method == "format_map" and given and isinstance(given[0], Mapping) else given
        run.allow(_bound_formatted(text, "{", values))
    elif method == "join" and args:
        items = list(Steps(args[0]))
        run.allow(format_size(items) + len(text) * len(items))
        return (items, *args[1:])
    return tuple(args)


def check_filter(name: str, value: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """Check a call of a filter, and return the value to call it with.

    Raises:
        OverBudget: if the result would be too large.
    """
    run, numbers = get_budget(), [abs(v) for v in (*args, *named.values()) if isinstance(v, int)]
    if name in ("center", "indent", "replace"):
        check_call(str(value), name, args, named)
    elif name == "format":
        run.allow(_bound_formatted(str(value), "%", [*args, *named.values()]))
    elif name in ("batch", "slice"):
        run.allow(max(numbers, default=0))
    elif name == "join":
        items, separator = list(Steps(value)), str((args or [named.get("d", "")])[0])
        run.allow(format_size(items) + len(separator) * len(items))
        return items
    elif name == "sum":
        items = list(Steps(value))
        run.charge(sum(len(item) for item in items if isinstance(item, (list, tuple))) * len(items))
        return items
    elif name == "tojson" and max(numbers, default=0) > _MAX_INDENT:
        raise OverBudget(f"it indents JSON by more than {_MAX_INDENT}")
    elif name in ("string", "pprint", "tojson", "xmlattr", "urlencode"):
        format_size(value)
    return value
