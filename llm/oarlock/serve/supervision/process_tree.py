"""The child processes of `oarlock serve`: starts and ends them in order, and restarts what ends by itself."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from oarlock.environment.console import get_logger
from oarlock.errors import ModelError, OarlockError
from oarlock.serve.config import ServeConfig
from oarlock.serve.front.start import front_mark, start_front, tell_front
from oarlock.serve.supervision.guardian import clean_up, end_guardian, guard_session, start_guardian
from oarlock.serve.supervision.listening import Listening
from oarlock.serve.supervision.model_supervisor import ModelSupervisor
from oarlock.serve.supervision.private_memory import close_memory
from oarlock.serve.supervision.process_output import follow
from oarlock.serve.supervision.restarting_process import RestartingProcess
from oarlock.serve.supervision.run_folder import count_busy, forget_models
from oarlock.serve.triton.control import TritonControl
from oarlock.serve.triton.served_repository import ServedTree
from oarlock.serve.triton.server import Installation, start_triton

logger = get_logger(__name__)

POLL_SECONDS = 0.1


class ProcessTree:
    """Triton, the front, and the guardian.

    Attributes:
        control: asks Triton.
        models: loads and watches Triton's models.
    """

    def __init__(
        self,
        installation: Installation,
        config: ServeConfig,
        keys: Sequence[str],
        listening: Listening,
        served: ServedTree,
        temporary: Path | None,
    ) -> None:
        """Make a tree of processes that are not started yet.

        Args:
            temporary: folder that the guardian removes at the end.
        """
        self._config, self._listening = config, listening
        self._keys = tuple(keys)
        self._run = Path(config.triton.run)
        self._guarded_folders = [self._run, *filter(None, [temporary])]
        self._triton = RestartingProcess("Triton", lambda: start_triton(installation, config, self.models.loaded))
        self._front = RestartingProcess(
            "the front", lambda: start_front(config, self._keys, listening.descriptors, self.restarts)
        )
        self._guardian = RestartingProcess("the guardian", self._start_guardian)
        self.control = TritonControl(config.triton.grpc_socket)
        self.models = ModelSupervisor(config, served, self.control, self._triton, self._tell_restarts)
        self._echo: list[threading.Thread] = []
        self._has_started = False
        self._quiet_since = 0.0

    @property
    def restarts(self) -> dict[str, int]:
        """Number of restarts of each part."""
        parts = {"triton": self._triton, "front": self._front, "guardian": self._guardian}
        return {name: part.restarts for name, part in parts.items()} | {"model": self.models.restarts}

    @property
    def seconds(self) -> float:
        """Seconds since Triton was started last."""
        return self._triton.seconds

    @property
    def is_up(self) -> bool:
        return self._triton.is_up and self._front.is_up

    def start(self, stopped: list[int]) -> None:
        """Start all parts, and wait until they answer or a signal comes.

        Raises:
            OarlockError: when one of them does not start.
        """
        self._guardian.start()
        for part in (self._triton, self._front):
            part.start()
            self._follow(part)
        while not self.is_up:
            if stopped:
                return
            failure = self.models.read_failure()
            if failure:
                raise ModelError(f"the model does not load: {failure}")
            for part in (self._triton, self._front):
                if not part.runs:
                    for thread in self._echo:
                        thread.join(2)  # its last words come first
                    raise OarlockError(f"{part.name} ended by itself ({part.describe_end()}); its output is above")
            start_seconds = self._config.triton.start_seconds
            if self._triton.seconds > start_seconds:
                raise ModelError(f"the model was not loaded within {start_seconds:g} s (--start-seconds)")
            self._note_who_is_up()
            time.sleep(POLL_SECONDS)
        self._has_started = True

    def check(self) -> None:
        """Restart what has ended by itself. To be called often."""
        self.models.check()
        start_seconds = self._config.triton.start_seconds
        for part in (self._triton, self._front, self._guardian):
            if part.runs:
                if not part.is_up and part is not self._guardian and part.seconds > start_seconds:
                    logger.info(f"{part.name} does not answer {start_seconds:g} s after its start; it is ended")
                    part.kill()
            elif not part.waits:
                assert part.process is not None
                if part is self._triton:  # end its models, which may wait for ever, and remove its shared memory
                    clean_up({part.process.pid}, self._config.triton.memory_prefix, ())
                    forget_models(self._run)
                    self._guard(0)
                    self.models.watch_none()
                if part.process.stdin is not None:
                    part.process.stdin.close()
                pause = part.note_end()
                logger.info(f"{part.name} ended by itself ({part.describe_end()}); it is restarted in {pause:g} s")
            elif part.restart_if_due():
                self._follow(part)
                self._tell_restarts()
        self._note_who_is_up()

    def replace_keys(self, keys: Sequence[str]) -> None:
        """Use other keys from now on."""
        self._keys = tuple(keys)
        self._tell_front({"keys": self._keys})

    def drain(self, stopped: list[int]) -> int:
        """Have the front and then Triton finish the open requests. Returns the exit code."""
        seconds = self._config.drain_seconds
        logger.info(f"stopping; open requests have {seconds:g} s (a second signal ends them at once)")
        deadline = time.monotonic() + seconds
        self._listening.close()
        for part, is_over in ((self._front, lambda: False), (self._triton, self._is_quiet)):
            if part.runs:
                assert part.process is not None
                part.process.terminate()
                self._wait(lambda part=part, over=is_over: not part.runs or over(), deadline, stopped)  # type: ignore[misc]
        left = count_busy(self._run)
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

    def _start_guardian(self) -> subprocess.Popen[str]:
        process = start_guardian(self._config.triton.memory_prefix, self._guarded_folders)
        if self._triton.runs:
            assert self._triton.process is not None
            guard_session(process, self._triton.process.pid)
        return process

    def _follow(self, part: RestartingProcess) -> None:
        """Print the output of a part that was started, and have the guardian end Triton."""
        process = part.process
        assert process is not None
        if part is self._guardian:
            return
        if part is self._triton:
            self._guard(process.pid)
            self.models.watch_none()
        name = "triton" if part is self._triton else "front"
        self._echo = [thread for thread in self._echo if thread.is_alive()]
        self._echo.append(follow(process, name, self._hides_output))

    def _hides_output(self) -> bool:
        """Hide Triton's output at the first start if it repeats why a model does not load."""
        is_first = not self._has_started and not self._config.triton.verbose
        return is_first and bool(self.models.read_failure())

    def _guard(self, session: int) -> None:
        if self._guardian.process is not None:
            guard_session(self._guardian.process, session)

    def _note_who_is_up(self) -> None:
        if self._triton.runs and not self._triton.is_up and self.control.is_ready():
            close_memory(self._config.triton.memory_prefix)
            self._note_up(self._triton)
            self.models.watch_all()
        if self._front.runs and not self._front.is_up:
            assert self._front.process is not None
            if front_mark(self._run, self._front.process.pid).exists():
                self._note_up(self._front)

    def _note_up(self, part: RestartingProcess) -> None:
        part.note_up()
        if part.restarts:
            logger.info(f"{part.name} answers again, {part.seconds:.1f} s after its start (restart {part.restarts})")

    def _tell_restarts(self) -> None:
        self._tell_front({"restarts": self.restarts})

    def _tell_front(self, content: Mapping[str, object]) -> None:
        if self._front.runs:
            assert self._front.process is not None
            tell_front(self._front.process, content)

    def _is_quiet(self) -> bool:
        """Check that no request has been open for a second. (Triton stays as long as a client keeps a connection.)"""
        now = time.monotonic()
        if count_busy(self._run):
            self._quiet_since = now
        return now - self._quiet_since > 1.0

    @staticmethod
    def _wait(is_over: Callable[[], bool], deadline: float, stopped: list[int]) -> None:
        while not is_over() and time.monotonic() < deadline and len(stopped) < 2:
            time.sleep(POLL_SECONDS)
