"""Replacing attributes of Paddle's modules and classes for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MISSING = object()


@contextmanager
def replace_attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Give a module or class other attributes while the context lasts. Inherited ones reappear afterwards."""
    before = {name: vars(owner).get(name, _MISSING) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
