"""`oarlock serve`: Triton and the OpenAI-compatible endpoint as one tree of processes.

    oarlock serve ── tritonserver ── a process for each Python model (one has the engine)
                 └── uvicorn: asks Triton over gRPC

SIGTERM and Ctrl-C come to the first alone: it has the endpoint finish what is open, then Triton, and at last ends
whatever is left. When it is killed, the kernel kills both children, and Triton's models end by themselves.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from oarlock.environment import say
from oarlock.errors import ConfigError, EnvironmentProblem, ModelError, OarlockError
from oarlock.serve.openai_api import ApiOptions
from oarlock.serve.openai_process import command, read_keys
from oarlock.serve.settings import Settings, noted_failure, num_busy
from oarlock.serve.triton_server import (
    ADMIN_HEADER,
    Installation,
    Ports,
    TritonOptions,
    adopt_orphans,
    answers,
    end_leftovers,
    is_ready,
    remove_run_folder,
    start_triton,
    sweep_memory,
    url_host,
)

_MEMORY_PREFIX = "oarlock-serve"
_LOOK_SECONDS = 0.1
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeOptions:
    """What `oarlock serve` is told.

    Attributes:
        repository: model repository of `oarlock export --target triton`.
        host: address that all ports are opened on.
        triton_host: the same for Triton's; "" for `host`, but for loopback where API keys are asked for.
        start_seconds: for loading the model.
        drain_seconds: for requests in flight when it is told to stop.
    """

    repository: Path
    host: str = "127.0.0.1"
    triton_host: str = ""
    ports: Ports = field(default_factory=Ports)
    limits: Mapping[str, float] = field(default_factory=dict)
    api_key_file: Path | None = None
    admin_key_file: Path | None = None
    start_seconds: float = 600.0
    drain_seconds: float = 30.0
    verbose: bool = False


def serve(options: ServeOptions) -> int:
    """Until SIGTERM or Ctrl-C; 0 when all that was in flight was answered.

    Raises:
        OarlockError: when it can't start, or a part of it ends by itself.
    """
    installation = Installation.find()
    models = repository_models(options.repository)
    if options.api_key_file:
        read_keys(options.api_key_file)
    triton_host = options.triton_host or ("127.0.0.1" if options.api_key_file else options.host)
    _check_ports(options, triton_host)
    sweep_memory(_MEMORY_PREFIX)
    adopt_orphans()
    run = Path(tempfile.mkdtemp(prefix="oarlock-serve-"))
    prefix = f"{_MEMORY_PREFIX}-{os.getpid()}-"
    triton_options = TritonOptions(
        repository=options.repository.resolve(),
        models=models,
        host=triton_host,
        ports=options.ports,
        limits=options.limits,
        run=run,
        memory_prefix=prefix,
        admin_key=_admin_key(options, triton_host),
        drain_seconds=options.drain_seconds,
        verbose=options.verbose,
    )
    with _stop_signals() as stopped:
        tree = _Tree(installation, triton_options, options)
        try:
            tree.start(stopped)
            while not stopped:
                tree.check()
                time.sleep(_LOOK_SECONDS)
            return tree.drain(stopped)
        finally:
            tree.end()
            end_leftovers(prefix)
            remove_run_folder(run)


class _Tree:
    """The children, and in which order they begin and end."""

    def __init__(self, installation: Installation, triton: TritonOptions, options: ServeOptions) -> None:
        self._installation, self._triton_options, self._options = installation, triton, options
        self._triton: subprocess.Popen[str] | None = None
        self._openai: subprocess.Popen[str] | None = None
        self._echo: list[threading.Thread] = []

    def start(self, stopped: list[int]) -> None:
        """Until both answer."""
        options, ports = self._options, self._options.ports
        host = self._triton_options.host
        began = time.monotonic()
        self._triton = start_triton(self._installation, self._triton_options)
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
        self._say_ready(time.monotonic() - began)

    def check(self) -> None:
        """Raise for a part that ended by itself, or a model that does not load."""
        failure = noted_failure(self._triton_options.run)
        for name, process in (("Triton", self._triton), ("the OpenAI endpoint", self._openai)):
            if process is None or process.poll() is None:
                continue
            if failure:
                raise ModelError(f"the model does not load: {failure}")
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
        )

    def _openai_answers(self) -> bool:
        return answers(f"http://{url_host(self._options.host)}:{self._options.ports.openai}/health")

    def _follow(self, process: subprocess.Popen[str], name: str) -> None:
        def echo() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() and not _is_noise(line):
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


def repository_models(repository: Path) -> tuple[str, ...]:
    """Names of the models in a repository.

    Raises:
        ConfigError: when there is none with our engine.
    """
    found = tuple(sorted(path.parent.name for path in repository.glob("*/config.pbtxt")))
    if not found:
        raise ConfigError(f"{repository}: no model repository (oarlock export --target triton --output DIR makes one)")
    engine_model(repository)
    return found


def engine_model(repository: Path) -> str:
    """The name of the model that has the engine."""
    found = [path.parents[1].name for path in repository.glob("*/1/model") if path.is_dir()]
    if len(found) != 1:
        raise ConfigError(f"{repository}: {len(found)} models with weights in this repository, not one")
    return found[0]


def engine_settings(repository: Path, limits: Mapping[str, float]) -> Settings:
    """The limits of a repository's config.pbtxt, and over them those that were given."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    path = repository / engine_model(repository) / "config.pbtxt"
    try:
        config = text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except (OSError, ValueError, text_format.ParseError) as error:
        raise ConfigError(f"{path}: not a Triton model configuration: {error}") from error
    return Settings.read({name: value.string_value for name, value in config.parameters.items()}, limits)


def _admin_key(options: ServeOptions, host: str) -> str:
    """What loading and unloading asks for: nothing on loopback, else the key of the file, or one that nobody knows."""
    if options.admin_key_file:
        return read_keys(options.admin_key_file)[0]
    if host in _LOOPBACK:
        return ""
    say(f"Triton is open on {host}: models can't be loaded there (--admin-key-file, header {ADMIN_HEADER})")
    return secrets.token_hex(16)


def _check_ports(options: ServeOptions, triton_host: str) -> None:
    ports = options.ports
    wanted = [
        ("--grpc-port", triton_host, ports.grpc),
        ("--rest-port", triton_host, ports.rest),
        ("--metrics-port", triton_host, ports.metrics),
        ("--port", options.host, ports.openai),
    ]
    seen: dict[int, str] = {}
    for flag, host, port in wanted:
        if port in seen:
            raise ConfigError(f"{flag} {port}: {seen[port]} has the same port")
        seen[port] = flag
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as error:
            reason = "the port is taken" if error.errno == 98 else error.strerror or str(error)
            raise EnvironmentProblem(f"{flag} {port} on {host}: {reason}; give another one") from error


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The signals that came, while in here."""
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_noise(line: str) -> bool:
    """Lines of every start of Triton on a machine without a GPU, and of Paddle, that no user can act on."""
    return any(
        words in line
        for words in ("Unable to allocate pinned system memory", "CUDA memory pool disabled", "No ccache found",
                      "warnings.warn(warning_message)", "DCGM unable to start", "CudaDriverHelper has not", "Failed to initialize NVML",
                      "Setuptools is replacing distutils")
    )  # fmt: skip
