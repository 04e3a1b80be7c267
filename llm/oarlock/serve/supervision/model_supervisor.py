"""Loads and unloads the models of a running Triton, and watches their processes.

Triton does not notice when the process of a Python model ends, and answers with errors from then on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from oarlock.environment.console import get_logger
from oarlock.errors import ModelError, OarlockError
from oarlock.serve.config import ServeConfig
from oarlock.serve.supervision.private_memory import close_memory
from oarlock.serve.supervision.restarting_process import RestartingProcess
from oarlock.serve.supervision.run_folder import read_failure
from oarlock.serve.triton.backend_processes import find_model_processes, is_alive, kill_stragglers
from oarlock.serve.triton.control import TritonControl
from oarlock.serve.triton.served_repository import ServedTree

logger = get_logger(__name__)


class ModelSupervisor:
    """The models of one Triton, which may be restarted.

    Attributes:
        restarts: how often a model was loaded again because a process of it had ended.
    """

    def __init__(
        self,
        config: ServeConfig,
        served: ServedTree,
        control: TritonControl,
        triton: RestartingProcess,
        note_restart: Callable[[], None],
    ) -> None:
        """Supervise the models of `triton`.

        Args:
            note_restart: is called when a model is to be loaded again.
        """
        self._config, self._served, self._control, self._triton = config, served, control, triton
        self._note_restart = note_restart
        self._run = Path(config.triton.run)
        self._unloaded: set[str] = set()
        self._processes: dict[int, str] = {}  # watched processes: number -> model
        self._former: set[int] = set()  # processes of replaced models, which end when they have answered
        self._loading = threading.Lock()  # held while a model is loaded; nothing is watched meanwhile
        self.restarts = 0

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the models that are loaded when Triton is restarted."""
        return tuple(name for name in self._config.triton.models if name not in self._unloaded)

    def load(self, model: str) -> None:
        """Load a model again, while the old one answers.

        Raises:
            ModelError: when that fails; the old one stays.
        """
        with self._loading:
            self.read_failure(forget=True)
            before = self._find_processes()
            self._served.write(model)
            try:
                self._control.load(model, self._config.triton.start_seconds)
            except ModelError as error:
                raise ModelError(self.read_failure(forget=True) or str(error)) from error
            close_memory(self._config.triton.memory_prefix)
            self._unloaded.discard(model)
            self._watch_new(before, model)

    def unload(self, model: str) -> None:
        """Unload a model, until it is loaded again.

        Raises:
            ModelError: when Triton does not answer.
        """
        with self._loading:
            before = self._find_processes()
            self._control.unload(model, self._config.triton.start_seconds)
            self._unloaded.add(model)
            self._watch_new(before, model)

    def read_failure(self, *, forget: bool = False) -> str:
        """Why a model did not load; "" if none failed.

        Args:
            forget: delete the note of it.
        """
        text = read_failure(self._run, forget=forget)
        return text.replace(f"{self._served.folder}/", f"{self._served.source}/")  # the paths that the user knows

    def watch_all(self) -> None:
        """Watch the processes of a Triton that has loaded its models."""
        self._processes, self._former = self._find_processes(), set()

    def watch_none(self) -> None:
        """Watch no process, since Triton is gone."""
        self._processes = {}

    def check(self) -> None:
        """Replace the models whose process has ended. If the engine's has, end Triton, which is restarted."""
        if not self._triton.is_up or not self._loading.acquire(blocking=False):
            return
        try:
            dead = {pid: name for pid, name in self._processes.items() if not is_alive(pid)}
            for process in dead:
                del self._processes[process]
        finally:
            self._loading.release()
        engine = self._config.triton.model
        for name in dict.fromkeys(dead.values()):
            restarted = "Triton" if name == engine else "it"
            logger.info(f"a process of the model {name} ended by itself; {restarted} is restarted")
            if name == engine:  # without it nothing can be answered
                self._triton.kill()
                return
            threading.Thread(target=self._load_again, args=(name,), name=f"load-{name}", daemon=True).start()

    def _load_again(self, model: str) -> None:
        triton = self._triton.process
        self.restarts += 1
        self._note_restart()
        former = [process for process, name in self._find_processes().items() if name == model]
        try:
            self.load(model)
            logger.info(f"the model {model} has been loaded again")
            if left := kill_stragglers(former, self._config.engine.timeout):  # no request lasts longer
                logger.info(f"{left} process(es) of the former {model} did not end; they were killed")
        except OarlockError as error:
            if triton is self._triton.process and self._triton.runs:
                logger.info(f"{error}; Triton is restarted")
                self._triton.kill()

    def _find_processes(self) -> dict[int, str]:
        if not self._triton.runs:
            return {}
        assert self._triton.process is not None
        paths = {name: self._served.folder / name / "1" / "model.py" for name in self._served.kinds}
        return find_model_processes(self._triton.process.pid, paths)

    def _watch_new(self, before: Mapping[int, str], model: str) -> None:
        """Watch the new processes of a model. Its old ones end when they have answered their requests.

        They may still be there when another model is loaded or unloaded.
        """
        found = self._find_processes()
        self._former = {pid for pid in found if pid in self._former or before.get(pid) == model}
        self._processes = {pid: name for pid, name in found.items() if pid not in self._former}
