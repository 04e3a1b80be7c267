"""The orders of `oarlock admin`: report the state, load and unload models, read the keys again."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from oarlock.environment.console import get_logger
from oarlock.errors import ConfigError, OarlockError
from oarlock.serve.front.keys import KeySource
from oarlock.serve.supervision.process_tree import ProcessTree
from oarlock.serve.triton.served_repository import ServedTree

logger = get_logger(__name__)

Action = Callable[[str], Mapping[str, Any]]


class Administration:
    """The actions of one server. They are called from the threads of the administration socket."""

    def __init__(
        self, tree: ProcessTree, served: ServedTree, keys: KeySource, refresh: Callable[[], None] | None
    ) -> None:
        """Administer a running tree.

        Args:
            refresh: brings the repository up to date with its sources, before a model is loaded again.
        """
        self._tree, self._served, self._key_source, self._refresh = tree, served, keys, refresh
        self._changing = threading.Lock()

    def list_actions(self) -> dict[str, Action]:
        """The actions by name. Each takes the name of a model ("" for none) and returns what the user is shown."""
        return {"status": self._status, "reload": self._reload, "load": self._load, "unload": self._unload,
                "keys": self._keys}  # fmt: skip

    def replace_keys(self) -> None:
        """Read the keys again, on SIGHUP. Keys that can't be read leave the old ones in use."""
        try:
            logger.info(str(self._keys("")["text"]))
        except OarlockError as error:
            logger.info(f"the keys are unchanged: {error}")

    def _status(self, model: str) -> Mapping[str, Any]:
        tree = self._tree
        return {
            "process": os.getpid(),
            "ready": tree.is_up,
            "models": tree.control.list_states(),
            "restarts": tree.restarts,
            "repository": str(self._served.source),
        }

    def _reload(self, model: str) -> Mapping[str, Any]:
        model = model or self._engine
        self._check_name(model)
        with self._changing:
            if self._refresh is not None:
                self._refresh()
            self._tree.models.load(model)
        logger.info(f"the model {model} was loaded again")
        return {"text": f"{model} was loaded again; the old one answered requests meanwhile"}

    def _load(self, model: str) -> Mapping[str, Any]:
        self._check_name(model)
        with self._changing:
            self._tree.models.load(model)
        logger.info(f"the model {model} was loaded")
        return {"text": f"{model} was loaded"}

    def _unload(self, model: str) -> Mapping[str, Any]:
        self._check_name(model)
        if model == self._engine:
            raise ConfigError(f"{model} has the engine, which answers all requests; stop the server instead")
        with self._changing:
            self._tree.models.unload(model)
        logger.info(f"the model {model} was unloaded")
        return {"text": f"{model} was unloaded"}

    def _keys(self, model: str) -> Mapping[str, Any]:
        with self._changing:
            source = self._key_source
            if source.file is None:
                raise ConfigError("the server was started without --api-key-file: there is nothing to read again")
            keys = source.read()
            self._tree.replace_keys(keys)
        return {"text": f"{len(keys)} key(s) of {source.file} are in use now"}

    @property
    def _engine(self) -> str:
        return next(name for name, kind in self._served.kinds.items() if kind == "oarlock")

    def _check_name(self, model: str) -> None:
        if model not in self._served.kinds:
            raise ConfigError(f"there is no model {model!r} here (there are: {', '.join(self._served.kinds)})")
