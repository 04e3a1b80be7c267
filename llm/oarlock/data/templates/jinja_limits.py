"""What a chat template may use: steps, time, and the size of what it makes.

A template comes with a model, from anybody. Jinja's sandbox keeps it from the machine, not from running for ever or
filling the memory. Here each turn of a loop, each call and all text that is made are counted against a budget; nothing
hangs on signals or other threads, so that it works in each thread of a server.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_STEPS = 3_000_000
_SECONDS = 4  # of this thread's processor time, so that a busy machine changes nothing
_LARGEST = 1 << 24  # characters of one text (or members of one list) ...
_LARGEST_PER_GIVEN = 16  # ... and so many more for each character of the messages
_WORK = 1 << 28  # characters of all texts together
_WORK_PER_GIVEN = 256
_DEEPEST = 100
_INDENT = 100  # the most spaces that `tojson` may indent by
_BITS = 1 << 16  # of a number


class OverBudget(Exception):
    """A template runs too long, or makes too much."""


class Budget:
    """What is left to one rendering.

    Args:
        given: characters of the messages.
    """

    def __init__(self, given: int) -> None:
        self.largest = _LARGEST + _LARGEST_PER_GIVEN * given
        self._work = _WORK + _WORK_PER_GIVEN * given
        self._steps = _STEPS
        self._deadline = time.thread_time() + _SECONDS

    def step(self) -> None:
        """A turn of a loop, or a call."""
        self._steps -= 1
        if self._steps < 0:
            raise OverBudget(f"it takes more than {_STEPS:,} steps")
        if self._steps % 256 == 0 and time.thread_time() > self._deadline:
            raise OverBudget(f"it takes more than {_SECONDS} seconds")

    def allow(self, size: int) -> None:
        """Refuse a text or list of this size before it is made."""
        if size > self.largest:
            raise OverBudget(f"it makes a text or list of more than {self.largest:,} characters or members")

    def charge(self, size: int) -> None:
        """A text or list of this size was made."""
        self.allow(size)
        self._work -= size
        if self._work < 0:
            raise OverBudget("it makes too much text")


_BUDGET: ContextVar[Budget | None] = ContextVar("template_budget", default=None)


def budget() -> Budget:
    """That of the rendering under way; while a template is compiled, one for each constant expression."""
    return _BUDGET.get() or Budget(0)


@contextmanager
def spending(given: int) -> Iterator[Budget]:
    """A budget for one rendering of messages of `given` characters."""
    token = _BUDGET.set(Budget(given))
    try:
        yield budget()
    finally:
        _BUDGET.reset(token)


class Steps:
    """What a loop goes over, each turn counted."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        items = iter(self._items)
        run = budget()

        def counted() -> Iterator[Any]:
            for item in items:
                run.step()
                yield item

        return counted()


def made(value: Any) -> Any:
    """The value itself, charged by its size where it has one."""
    if isinstance(value, (str, list, tuple)):
        budget().charge(len(value))
    return value


def size_as_text(value: Any) -> int:
    """About how many characters a value has as text.

    Raises:
        OverBudget: when these are too many, without making them.
    """
    run, left = budget(), [0]

    def add(part: Any, depth: int) -> None:
        left[0] += len(part) if isinstance(part, str) else 8
        run.allow(left[0])
        if depth > _DEEPEST:
            raise OverBudget(f"it nests values more than {_DEEPEST} deep")
        if isinstance(part, Mapping):
            for key, inner in part.items():
                add(key, depth + 1)
                add(inner, depth + 1)
        elif isinstance(part, (list, tuple, set, frozenset)):
            for inner in part:
                add(inner, depth + 1)

    add(value, 0)
    return left[0]


def operate(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be too large."""
    run = budget()
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
        run.charge(_formatted(left, "%", right if isinstance(right, (tuple, Mapping)) else (right,)))


def _allow_bits(bits: int) -> None:
    if bits > _BITS:
        raise OverBudget(f"it makes a number of more than {_BITS:,} bits")


def _formatted(pattern: str, mark: str, values: Iterable[Any] | Mapping[Any, Any]) -> int:
    """At most how many characters a format gives."""
    values = list(values.values() if isinstance(values, Mapping) else values)
    widths = [*map(int, re.findall(r"\d{1,18}", pattern)), *(abs(v) for v in values if isinstance(v, int))]
    return len(pattern) + pattern.count(mark) * (max(widths, default=0) + sum(map(size_as_text, values)))


def check_call(text: str, method: str, args: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Arguments for a method of a text, or for the filter of the same name, whose result is not too large.

    Raises:
        OverBudget: where it would be.
    """
    run, given = budget(), [*args, *named.values()]
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
        run.allow(_formatted(text, "{", values))
    elif method == "join" and args:
        items = list(Steps(args[0]))
        run.allow(size_as_text(items) + len(text) * len(items))
        return (items, *args[1:])
    return tuple(args)


def check_filter(name: str, value: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """The value that a filter is given, where what it makes is not too large.

    Raises:
        OverBudget: where it would be.
    """
    run, numbers = budget(), [abs(v) for v in (*args, *named.values()) if isinstance(v, int)]
    if name in ("center", "indent", "replace"):
        check_call(str(value), name, args, named)
    elif name == "format":
        run.allow(_formatted(str(value), "%", [*args, *named.values()]))
    elif name in ("batch", "slice"):
        run.allow(max(numbers, default=0))
    elif name == "join":
        items, separator = list(Steps(value)), str((args or [named.get("d", "")])[0])
        run.allow(size_as_text(items) + len(separator) * len(items))
        return items
    elif name == "sum":
        items = list(Steps(value))
        run.charge(sum(len(item) for item in items if isinstance(item, (list, tuple))) * len(items))
        return items
    elif name == "tojson" and max(numbers, default=0) > _INDENT:
        raise OverBudget(f"it indents JSON by more than {_INDENT}")
    elif name in ("string", "pprint", "tojson", "xmlattr", "urlencode"):
        size_as_text(value)
    return value
