"""A sequence whose elements are read on access."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

Element = TypeVar("Element", covariant=True)


class StoredSequence(Sequence[Element]):
    """A sequence with negative indices and slices, implemented by read_element()."""

    @abstractmethod
    def read_element(self, index: int) -> Element:
        """Read the element at 0 <= index < len(self)."""

    @overload
    def __getitem__(self, index: int) -> Element: ...
    @overload
    def __getitem__(self, index: slice) -> list[Element]: ...
    def __getitem__(self, index: int | slice) -> Element | list[Element]:
        found = range(len(self))[index]  # raises IndexError
        return [self.read_element(i) for i in found] if isinstance(found, range) else self.read_element(found)
