"""The child processes of `oarlock serve`: starts and ends them in order, and starts again what ends by itself."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from oarlock.environment.console import get_logger
from oarlock.errors import ModelError, OarlockError
from oarlock.serve.engine.limits import forget_processes, noted_failure, num_busy
from oarlock.serve.front.options import FrontOptions
from oarlock.serve.front.start import front_mark, start_front, tell_front
from oarlock.serve.options import ServeOptions
from oarlock.serve.supervision.guardian import clear_up, end_guardian, guard, start_guardian
from oarlock.serve.supervision.listening import Listening
from oarlock.serve.supervision.private_memory import close_memory
from oarlock.serve.supervision.process_output import follow
from oarlock.serve.supervision.restarting_process import Part
from oarlock.serve.triton.backend_processes import end_left, is_alive, model_processes
from oarlock.serve.triton.control import TritonControl
from oarlock.serve.triton.served_repository import ServedTree
from oarlock.serve.triton.server import Installation, TritonOptions, start_triton

logger = get_logger(__name__)

LOOK_SECONDS = 0.1


class ProcessTree:
    """Triton, the front, and the guardian."""

    def __init__(
        self,
        installation: Installation,
        triton: TritonOptions,
        options: ServeOptions,
        front: FrontOptions,
        listening: Listening,
        served: ServedTree,
    ) -> None:
        """A tree of parts that are not started yet."""
        self._installation = installation
        self._triton_options, self._options, self._listening, self._served = triton, options, listening, served
        self._front_options = front
        self.control = TritonControl(triton.grpc_socket)
        self._triton = Part("Triton", self._start_triton)
        self._front = Part("the front", self._start_front)
        self._guardian = Part("the guardian", self._start_guardian)
        self._echo: list[threading.Thread] = []
        self._models: dict[int, str] = {}  # processes of models that are watched
        self._unloaded: set[str] = set()
        self._loading = threading.Lock()  # who loads models; it is not watched meanwhile
        self._has_started = False
        self._quiet_since = 0.0
        self._model_restarts = 0

    @property
    def restarts(self) -> dict[str, int]:
        """How often each part has been started again."""
        parts = {"triton": self._triton, "front": self._front, "guardian": self._guardian}
        return {name: part.restarts for name, part in parts.items()} | {"model": self._model_restarts}

    def start(self, stopped: list[int]) -> None:
        """Start all parts, and wait until they answer or a signal comes.

        Raises:
            OarlockError: when it does not, the first time.
        """
        self._guardian.start()
        self._start(self._triton)
        self._start(self._front)
        while not (self._triton.is_up and self._front.is_up):
            if stopped:
                return
            self._check_first_start()
            self._look_whether_up()
            time.sleep(LOOK_SECONDS)
        self._has_started = True

    def check(self) -> None:
        """Start again what has ended by itself. To be called often."""
        self._check_models()
        for part in (self._triton, self._front, self._guardian):
            if part.runs:
                if not part.is_up and part is not self._guardian and part.seconds > self._options.start_seconds:
                    logger.info(
                        f"{part.name} does not answer {self._options.start_seconds:g} s after its start; it is ended"
                    )
                    part.kill()
            elif not part.waits:
                self._clear_up_after(part)
                pause = part.note_end()
                logger.info(f"{part.name} ended by itself ({part.how_it_ended()}); it is started again in {pause:g} s")
            elif part.start_again_if_due():
                self._follow(part)
                self._tell_front({"restarts": self.restarts})
        self._look_whether_up()

    @property
    def seconds(self) -> float:
        """Seconds since Triton was started last."""
        return self._triton.seconds

    @property
    def is_up(self) -> bool:
        """Whether all parts answer."""
        return self._triton.is_up and self._front.is_up

    def replace_keys(self, keys: Sequence[str]) -> None:
        """Use other keys from now on."""
        self._front_options = dataclasses.replace(self._front_options, keys=tuple(keys))
        self._tell_front({"keys": list(keys)})

    def load(self, model: str) -> None:
        """Load a model again, while the old one answers.

        Raises:
            ModelError: when that fails; the old one stays.
        """
        with self._loading:
            noted_failure(self._triton_options.run, forget=True)
            before = self._model_processes()
            self._served.write(model)
            try:
                self.control.load(model, self._options.start_seconds)
            except ModelError as error:
                raise ModelError(self._failure(forget=True) or str(error)) from error
            close_memory(self._triton_options.memory_prefix)
            self._unloaded.discard(model)
            self._watch_new_models(before, model)

    def unload(self, model: str) -> None:
        """Unload a model, until it is loaded again.

        Raises:
            ModelError: when Triton does not answer.
        """
        with self._loading:
            before = self._model_processes()
            self.control.unload(model, self._options.start_seconds)
            self._unloaded.add(model)
            self._watch_new_models(before, model)

    def drain(self, stopped: list[int]) -> int:
        """Have the front and then Triton finish the open requests. Gives the exit code."""
        logger.info(f"stopping; requests in flight have {self._options.drain_seconds:g} s (once more: at once)")
        deadline = time.monotonic() + self._options.drain_seconds
        self._listening.close()
        for part, is_over in ((self._front, lambda: False), (self._triton, self._is_quiet)):
            if part.runs:
                assert part.process is not None
                part.process.terminate()
                self._wait(lambda part=part, over=is_over: not part.runs or over(), deadline, stopped)  # type: ignore[misc]
        left = num_busy(self._triton_options.run)
        if left:
            logger.info(f"{left} request(s) were not finished")
        return 1 if left else 0

    def end(self) -> None:
        """End all parts that still run."""
        for part in (self._front, self._triton):
            part.kill()
        self.control.close()
        if self._guardian.process is not None:
            end_guardian(self._guardian.process)

    # the parts

    def _start(self, part: Part) -> None:
        part.start()
        self._follow(part)

    def _follow(self, part: Part) -> None:
        process = part.process
        assert process is not None
        if part is self._guardian:
            return
        if part is self._triton:
            self._guard(process.pid)
            self._models = {}
        name = "triton" if part is self._triton else "front"
        self._echo = [thread for thread in self._echo if thread.is_alive()]
        self._echo.append(follow(process, name, self._is_known))

    def _is_known(self) -> bool:
        """Whether Triton's output is left out now: it repeats why a model does not load."""
        is_first = not self._has_started and not self._options.verbose
        return is_first and bool(noted_failure(self._triton_options.run))

    def _start_triton(self) -> subprocess.Popen[str]:
        models = tuple(name for name in self._triton_options.models if name not in self._unloaded)
        return start_triton(self._installation, dataclasses.replace(self._triton_options, models=models))

    def _start_front(self) -> subprocess.Popen[str]:
        sockets = self._listening.descriptors
        return start_front(dataclasses.replace(self._front_options, sockets=sockets, restarts=self.restarts))

    def _start_guardian(self) -> subprocess.Popen[str]:
        folders = [self._triton_options.run, *filter(None, [self._options.temporary])]
        process = start_guardian(self._triton_options.memory_prefix, folders)
        if self._triton.runs:
            assert self._triton.process is not None
            guard(process, self._triton.process.pid)
        return process

    def _guard(self, session: int) -> None:
        if self._guardian.process is not None:
            guard(self._guardian.process, session)

    def _clear_up_after(self, part: Part) -> None:
        """End the models of a Triton that is gone (they may wait for ever), and remove its shared memory."""
        assert part.process is not None
        if part is self._triton:
            clear_up({part.process.pid}, self._triton_options.memory_prefix, ())
            forget_processes(self._triton_options.run)
            self._guard(0)
            self._models = {}
        if part.process.stdin is not None:
            part.process.stdin.close()

    def _check_first_start(self) -> None:
        failure = self._failure()
        if failure:
            raise ModelError(f"the model does not load: {failure}")
        for part in (self._triton, self._front):
            if not part.runs:
                for thread in self._echo:
                    thread.join(2)  # its last words come first
                raise OarlockError(f"{part.name} ended by itself ({part.how_it_ended()}); its output is above")
        if self._triton.seconds > self._options.start_seconds:
            raise ModelError(f"the model was not loaded within {self._options.start_seconds:g} s (--start-seconds)")

    def _failure(self, *, forget: bool = False) -> str:
        return self._served.with_their_paths(noted_failure(self._triton_options.run, forget=forget))

    def _look_whether_up(self) -> None:
        if self._triton.runs and not self._triton.is_up and self.control.is_ready():
            close_memory(self._triton_options.memory_prefix)
            self._note_up(self._triton)
            self._models = self._model_processes()
        if self._front.runs and not self._front.is_up:
            assert self._front.process is not None
            if front_mark(self._triton_options.run, self._front.process.pid).exists():
                self._note_up(self._front)

    def _note_up(self, part: Part) -> None:
        part.note_up()
        if part.restarts:
            logger.info(f"{part.name} answers again, {part.seconds:.1f} s after its start (restart {part.restarts})")

    def _tell_front(self, content: Mapping[str, object]) -> None:
        if self._front.runs:
            assert self._front.process is not None
            tell_front(self._front.process, json.dumps(content))

    # the models

    def _model_processes(self) -> dict[int, str]:
        if not self._triton.runs:
            return {}
        assert self._triton.process is not None
        paths = {name: self._served.folder / name / "1" / "model.py" for name in self._served.kinds}
        return model_processes(self._triton.process.pid, paths)

    def _watch_new_models(self, before: Mapping[int, str], model: str) -> None:
        """Follow a model that was changed: its old processes end when their requests are answered."""
        found = self._model_processes()
        self._models = {pid: name for pid, name in found.items() if name != model or pid not in before}

    def _check_models(self) -> None:
        """Look for models whose process has ended: Triton does not notice, and answers with errors."""
        if not self._triton.is_up or not self._loading.acquire(blocking=False):
            return
        try:
            dead = {pid: name for pid, name in self._models.items() if not is_alive(pid)}
            for process in dead:
                del self._models[process]
        finally:
            self._loading.release()
        engine = self._front_options.model
        for name in dict.fromkeys(dead.values()):
            again = "Triton" if name == engine else "it"
            logger.info(f"a process of the model {name} ended by itself; {again} is started again")
            if name == engine:  # without it nothing can be answered
                self._triton.kill()
                return
            threading.Thread(target=self._load_again, args=(name,), name=f"load-{name}", daemon=True).start()

    def _load_again(self, model: str) -> None:
        of = self._triton.process
        self._model_restarts += 1
        self._tell_front({"restarts": self.restarts})
        former = [process for process, name in self._model_processes().items() if name == model]
        try:
            self.load(model)
            logger.info(f"the model {model} is whole again")
            if left := end_left(former, self._front_options.timeout):  # no request lasts longer
                logger.info(f"{left} process(es) of the former {model} did not end; they were killed")
        except OarlockError as error:
            if of is self._triton.process and self._triton.runs:
                logger.info(f"{error}; Triton is started again")
                self._triton.kill()

    def _is_quiet(self) -> bool:
        """Whether no request has been open for a second. (Triton stays as long as a client keeps a connection.)"""
        now = time.monotonic()
        if num_busy(self._triton_options.run):
            self._quiet_since = now
        return now - self._quiet_since > 1.0

    @staticmethod
    def _wait(is_over: Callable[[], bool], deadline: float, stopped: list[int]) -> None:
        while not is_over() and time.monotonic() < deadline and len(stopped) < 2:
            time.sleep(LOOK_SECONDS)
