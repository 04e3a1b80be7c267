"""A sequence whose elements are read when they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

Element = TypeVar("Element", covariant=True)


class StoredSequence(Sequence[Element]):
    """Indices from either end, and slices, over element(), which knows neither."""

    @abstractmethod
    def element(self, index: int) -> Element:
        """That at 0 <= index < len(self)."""

    @overload
    def __getitem__(self, index: int) -> Element: ...
    @overload
    def __getitem__(self, index: slice) -> list[Element]: ...
    def __getitem__(self, index: int | slice) -> Element | list[Element]:
        found = range(len(self))[index]  # raises IndexError
        return [self.element(i) for i in found] if isinstance(found, range) else self.element(found)
