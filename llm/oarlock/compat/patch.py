"""One change to Paddle or PaddleNLP: what it replaces, by what, why, and until when."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

_MISSING = object()  # the owner has no such name


@dataclass(frozen=True)
class Machine:
    """The properties of a machine that decide whether a patch applies.

    Attributes:
        device: the device of a run.
        has_fused_ops: the fused CPU operators are built and can be used.
        has_slow_mkl: Paddle's MKL runs its slowest code on this processor.
    """

    device: Literal["cpu", "gpu"]
    has_fused_ops: bool
    has_slow_mkl: bool

    def is_cpu(self) -> bool:
        return self.device == "cpu"

    def uses_fused_ops(self) -> bool:
        return self.is_cpu() and self.has_fused_ops

    def uses_onednn(self) -> bool:
        return self.is_cpu() and self.has_slow_mkl

    def is_any(self) -> bool:
        return True


@dataclass(frozen=True)
class Patch:
    """A name of Paddle or PaddleNLP that is replaced.

    Attributes:
        target: "module:name" or "module:Class.name".
        replacement: the object that takes its place, "module:name". Its documentation names the differences.
        why: what happens without the patch.
        until: when the patch can go.
        scope: "process" patches stay once they are applied. "while_building" patches are undone after a model, a
            wrapper or a graph is built. "object" patches change single objects and leave the class as it is.
        installed_by: the module that applies it.
        applies: whether a run on a machine can need it.
        wraps: the replacement is a function of the original that returns the new object.
        also: other owners ("module" or "module:Class") that imported the name and are patched too.
    """

    target: str
    replacement: str
    why: str
    until: str
    scope: Literal["process", "while_building", "object"]
    installed_by: str
    applies: Callable[[Machine], bool] = Machine.is_any
    wraps: bool = False
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The last part of the target."""
        return self.target.rpartition(":")[2].rpartition(".")[2]

    def owners(self) -> list[Any]:
        """The modules and classes whose name is replaced; imports them."""
        owner = self.target.removesuffix(self.name).rstrip(".:")
        return [find_object(place) for place in (owner, *self.also)]


def find_object(place: str) -> Any:
    """The module, class or function that a "module" or "module:path.in.it" names; imports the module."""
    module, _, path = place.partition(":")
    found = import_module(module)
    for name in path.split(".") if path else ():
        found = getattr(found, name)
    return found


class AppliedPatches:
    """The patches of one module that are in place, with the originals."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._originals)

    def apply(self, patches: Iterable[Patch]) -> None:
        """Put patches in place."""
        for patch in patches:
            replacement = find_object(patch.replacement)
            for owner in patch.owners():
                self.replace(owner, patch.name, replacement(getattr(owner, patch.name)) if patch.wraps else replacement)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Replace one name."""
        self._originals.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def restore(self) -> None:
        """Put the originals back, the last one first."""
        while self._originals:
            owner, name, original = self._originals.pop()
            if original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


@contextlib.contextmanager
def patched(patches: Iterable[Patch]) -> Iterator[None]:
    """Apply patches for the duration of a block."""
    applied = AppliedPatches()
    try:
        applied.apply(patches)
        yield
    finally:
        applied.restore()


@contextlib.contextmanager
def replaced(*names: tuple[Any, str], by: Any) -> Iterator[None]:
    """Replace (owner, name) pairs by one object for the duration of a block."""
    applied = AppliedPatches()
    try:
        for owner, name in names:
            applied.replace(owner, name, by)
        yield
    finally:
        applied.restore()
