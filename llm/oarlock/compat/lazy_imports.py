"""Importing paddlenlp without the parts that training does not use. They are imported when they are used.

Any import of paddlenlp 3.0.0b4 also imports its demo server, task pipelines, metrics and data sets, and with them
fastapi, scikit-learn, scipy.stats, pandas and pyarrow. That takes 1.8 of the 2.5 seconds of the import and 160 of 230
MB, in every process.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_VERSION = "3.0.0b4"  # other versions are imported as they are
_UNUSED_DATA = ("dataaug", "datasets", "metrics")
_UNUSED_MODELS = ("embeddings", "experimental", "mergekit", "prompt", "seq2vec", "server", "taskflow", "trl")
_PARTS = frozenset((*_UNUSED_DATA, *_UNUSED_MODELS))
_CLASSES = {"SimpleServer": "server", "Taskflow": "taskflow"}  # names of these parts in the namespace of paddlenlp
_LIBRARY = "datasets"  # imported by paddlenlp's trainer to check whether its data are datasets.Dataset


def install() -> None:
    """Make the first import of paddlenlp lazy. Does nothing if it is already imported, or of another version."""
    if "paddlenlp" in sys.modules or any(isinstance(finder, _PaddlenlpFinder) for finder in sys.meta_path):
        return
    try:
        version = metadata.version("paddlenlp")
    except metadata.PackageNotFoundError:
        return
    if version == _VERSION:
        sys.meta_path.insert(0, _PaddlenlpFinder())


class _PaddlenlpFinder(MetaPathFinder):
    """Finds paddlenlp itself, once."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name != "paddlenlp":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _WithoutParts(spec.loader)
        return spec


class _WithoutParts(Loader):
    """Runs paddlenlp's own code with empty modules in place of its parts, and removes these afterwards."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        parts = _Parts()
        sys.meta_path.insert(0, parts)
        try:
            self._own.exec_module(module)
        finally:
            sys.meta_path.remove(parts)
            for name in parts.replaced:
                sys.modules.pop(name, None)
            for name in (*_PARTS, *_CLASSES):
                vars(module).pop(name, None)
            vars(module)["__getattr__"] = _import_on_demand


def _import_on_demand(name: str) -> Any:
    """Import paddlenlp.<part>, or a class of a part, when it is used."""
    if name in _PARTS:
        return importlib.import_module(f"paddlenlp.{name}")
    if name in _CLASSES:
        return getattr(importlib.import_module(f"paddlenlp.{_CLASSES[name]}"), name)
    raise AttributeError(f"module 'paddlenlp' has no attribute {name!r}")


class _Parts(MetaPathFinder, Loader):
    """Finds empty modules in place of the parts and of the library datasets."""

    def __init__(self) -> None:
        self.replaced: list[str] = []

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        package, _, rest = name.partition(".")
        if package == "paddlenlp" and rest.split(".")[0] in _PARTS:
            self.replaced.append(name)
            return ModuleSpec(name, self, is_package=True)
        if name == _LIBRARY and PathFinder.find_spec(name, path, target) is not None:
            self.replaced.append(name)
            return ModuleSpec(name, self)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Library(spec.name) if spec.name == _LIBRARY else _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module is empty."""


class _Empty(ModuleType):
    """Has a callable for every name, which imports the real one when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Deferred(self.__name__, name)


class _Library(ModuleType):
    """The library datasets, for type checks: until it is imported, nothing is of its types."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        if name == "Dataset" and self.__name__ not in sys.modules:
            return ()
        return getattr(importlib.import_module(self.__name__), name)


class _Deferred:
    """A function or class of a part in the namespace of another module."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return getattr(importlib.import_module(self._module), self._name)(*arguments, **named)
