"""The children of `oarlock serve`, and in which order they begin and end."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from oarlock.environment import die_with_parent, say
from oarlock.errors import ModelError, OarlockError
from oarlock.serve.guardian import guard
from oarlock.serve.openai_api import ApiOptions
from oarlock.serve.openai_process import command
from oarlock.serve.options import ServeOptions
from oarlock.serve.repository import chat_temperature, engine_model, engine_settings
from oarlock.serve.settings import noted_failure, num_busy
from oarlock.serve.triton_server import Installation, TritonOptions, answers, is_ready, start_triton, url_host

_LOOK_SECONDS = 0.1
# Lines of every start of Triton on a machine without a GPU, and of Paddle, that no user can act on.
_NOISE = (
    "Unable to allocate pinned system memory",
    "CUDA memory pool disabled",
    "HandleCancellation called even when the context was not cancelled",  # for each stream that ended with an error
    "CudaDriverHelper has not been initialized",
    "DCGM unable to start",
    "Signal (15) received",
    "Non-graceful termination detected",  # of a process that is ended when all is answered
    "Failed to initialize NVML",
    "No ccache found",
    "warnings.warn(warning_message)",
    "Setuptools is replacing distutils",
)


class ProcessTree:
    """The children, and in which order they begin and end."""

    def __init__(self, installation: Installation, triton: TritonOptions, options: ServeOptions) -> None:
        self._installation, self._triton_options, self._options = installation, triton, options
        self._triton: subprocess.Popen[str] | None = None
        self._openai: subprocess.Popen[str] | None = None
        self._echo: list[threading.Thread] = []
        self._ready = False

    def start(self, stopped: list[int], guardian: subprocess.Popen[str]) -> None:
        """Until both answer."""
        options, ports = self._options, self._options.ports
        host = self._triton_options.host
        began = time.monotonic()
        self._triton = start_triton(self._installation, self._triton_options)
        guard(guardian, self._triton.pid)  # which leads a session of its own
        # Before there is a thread: a child that is told to die with its parent has to be made by one that stays.
        self._openai = self._start_openai(f"{url_host(host)}:{ports.grpc}")
        self._follow(self._triton, "triton")
        self._follow(self._openai, "openai")
        while not (is_ready(host, ports.rest) and self._openai_answers()):
            if stopped:
                return
            self.check()
            if time.monotonic() - began > options.start_seconds:
                raise ModelError(f"the model was not loaded within {options.start_seconds:g} s (--start-seconds)")
            time.sleep(_LOOK_SECONDS)
        self._ready = True
        self._say_ready(time.monotonic() - began)

    def check(self) -> None:
        """Raise for a part that ended by itself, or a model that does not load."""
        failure = "" if self._ready else noted_failure(self._triton_options.run)
        if failure:
            raise ModelError(f"the model does not load: {failure}")
        for name, process in (("Triton", self._triton), ("the OpenAI endpoint", self._openai)):
            if process is None or process.poll() is None:
                continue
            for thread in self._echo:
                thread.join(2)  # its last words come first
            how = f"signal {-process.returncode}" if process.returncode < 0 else f"code {process.returncode}"
            raise OarlockError(f"{name} ended by itself ({how}); what it said stands above")

    def drain(self, stopped: list[int]) -> int:
        """Have both finish what is open, the endpoint first, since it asks Triton."""
        say(f"stopping; requests in flight have {self._options.drain_seconds:g} s (once more: at once)")
        deadline = time.monotonic() + self._options.drain_seconds
        assert self._triton is not None and self._openai is not None
        self._openai.terminate()
        self._wait(lambda: self._openai.poll() is not None, deadline, stopped)  # type: ignore[union-attr]
        self._triton.terminate()
        # Triton stays as long as a client keeps a connection open; what counts is that nothing is being answered.
        quiet_since: float | None = None

        def is_over() -> bool:
            nonlocal quiet_since
            if num_busy(self._triton_options.run):
                quiet_since = None
            elif quiet_since is None:
                quiet_since = time.monotonic()
            quiet = quiet_since is not None and time.monotonic() - quiet_since > 1.0
            return quiet or self._triton.poll() is not None  # type: ignore[union-attr]

        self._wait(is_over, deadline, stopped)
        left = num_busy(self._triton_options.run)
        if left:
            say(f"{left} request(s) were not finished")
        return 1 if left else 0

    def end(self) -> None:
        """What is left of them."""
        for process in (self._openai, self._triton):
            if process is not None and process.poll() is None:
                process.kill()
        for process in (self._openai, self._triton):
            if process is not None:
                process.wait()

    @staticmethod
    def _wait(is_over: Callable[[], bool], deadline: float, stopped: list[int]) -> None:
        while not is_over() and time.monotonic() < deadline and len(stopped) < 2:
            time.sleep(_LOOK_SECONDS)

    def _start_openai(self, triton: str) -> subprocess.Popen[str]:
        options = self._options
        settings = engine_settings(options.repository, options.limits)
        api = ApiOptions(
            triton=triton,
            model=engine_model(options.repository),
            keys=(),
            max_body=settings.max_body,
            max_open=settings.max_batch + settings.max_queue,
            temperature=chat_temperature(options.repository),
        )
        words = command(api, options.host, options.ports.openai, options.drain_seconds, options.api_key_file)
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            words,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def _openai_answers(self) -> bool:
        return answers(f"http://{url_host(self._options.host)}:{self._options.ports.openai}/health")

    def _follow(self, process: subprocess.Popen[str], name: str) -> None:
        def echo() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                # What Triton says after the model has told why it does not load is that, several times.
                known = not self._ready and not self._options.verbose and noted_failure(self._triton_options.run)
                if line.strip() and not known and not any(words in line for words in _NOISE):
                    print(f"{name}: {line.rstrip()}", flush=True)

        thread = threading.Thread(target=echo, name=f"{name}-log", daemon=True)
        thread.start()
        self._echo.append(thread)

    def _say_ready(self, seconds: float) -> None:
        options, ports = self._options, self._options.ports
        triton, openai = url_host(self._triton_options.host), url_host(options.host)
        model = engine_model(options.repository)
        key = ' -H "Authorization: Bearer $KEY"' if options.api_key_file else ""
        say(
            f"ready after {seconds:.1f} s\n"
            f"  OpenAI   http://{openai}:{ports.openai}/v1\n"
            f"  REST     http://{triton}:{ports.rest}/v2/models/{model}/generate\n"
            f"  gRPC     {triton}:{ports.grpc}\n"
            f"  metrics  http://{triton}:{ports.metrics}/metrics\n"
            f"  try      curl http://{openai}:{ports.openai}/v1/chat/completions{key}"
            " -H 'Content-Type: application/json'"
            f' -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}\''
        )
