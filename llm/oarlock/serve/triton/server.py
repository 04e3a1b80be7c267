"""The tritonserver of the nvidia-pytriton wheel: found, started on a model repository, waited for, ended."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from oarlock.environment.signals import die_with_parent
from oarlock.errors import EnvironmentProblem
from oarlock.serve.engine.limits import LIMITS_VARIABLE, RUN_VARIABLE
from oarlock.serve.supervision.private_memory import memory_filter

_INSTALL = "pip install 'oarlock[serve]'"
_GRPC, _METRICS = "grpc", "metrics"
_MAX_SOCKET_PATH = 107  # of sockaddr_un, less the NUL at the end
# What lets a client reach into the machine, or changes what is written of it. The key is thrown away.
_CLOSED = "shared-memory,trace,logging"


@dataclass(frozen=True)
class Installation:
    """Where the parts of Triton are.

    Attributes:
        backend: folder of the Python backend.
        stub: program that runs a Python model; one for each version of Python.
        libraries: folders that the binary and the stub need on LD_LIBRARY_PATH.
    """

    binary: Path
    backend: Path
    stub: Path
    libraries: tuple[Path, ...]

    @classmethod
    def find(cls) -> Installation:
        """Of the running Python.

        Raises:
            EnvironmentProblem: saying what to install.
        """
        try:
            wheel = metadata.distribution("nvidia-pytriton")
        except metadata.PackageNotFoundError as error:
            raise EnvironmentProblem(f"Triton is not installed here: {_INSTALL}") from error
        site = Path(str(wheel.locate_file("")))
        root = site / "pytriton" / "tritonserver"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        found = cls(
            binary=root / "bin" / "tritonserver",
            backend=root / "backends" / "python",
            stub=root / "python_backend_stubs" / version / "triton_python_backend_stub",
            libraries=(site / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")),
        )
        for path in (found.binary, found.backend / "libtriton_python.so", found.stub):
            if not path.is_file():
                raise EnvironmentProblem(
                    f"{path} is missing: this nvidia-pytriton {wheel.version} has no Triton for Python {version} on "
                    "this platform (Linux on x86-64 or ARM-64 has one)"
                )
        found._check_libpython(version)
        return found

    def _check_libpython(self, version: str) -> None:
        """The stub is linked to libpython, which Debian and some others have in a package of its own."""
        import ctypes

        name = f"libpython{version}.so.1.0"
        if any((folder / name).is_file() for folder in self.libraries):
            return
        try:
            ctypes.CDLL(name)
        except OSError as error:
            raise EnvironmentProblem(
                f"{name} is missing, which Triton's Python models need (Debian, Ubuntu: apt-get install "
                f"libpython{version}; pyenv: a Python built with --enable-shared)"
            ) from error


@dataclass(frozen=True)
class TritonOptions:
    """How to start it.

    It has no port: clients come to the front, which asks Triton through Unix sockets in a folder of this user alone.

    Attributes:
        repository: model repository.
        models: of it that are loaded.
        limits: of requests, over those of the repository (fields of Settings).
        run: a folder of this server alone (mode 0700), for the sockets, the backend's links and what the models tell.
        memory_prefix: of its areas of shared memory.
        drain_seconds: for requests in flight when it is told to stop.
    """

    repository: Path
    models: tuple[str, ...]
    limits: Mapping[str, Any]
    run: Path
    memory_prefix: str
    drain_seconds: float = 30.0
    verbose: bool = False

    @property
    def grpc_socket(self) -> Path:
        """Where it takes requests. (Triton puts a colon and the port behind whatever address it is given.)"""
        return self.run / f"{_GRPC}:1"

    @property
    def metrics_socket(self) -> Path:
        """Where it gives its metrics, over HTTP."""
        return self.run / _METRICS


def start_triton(installation: Installation, options: TritonOptions) -> subprocess.Popen[str]:
    """The process; it dies with this one, and its output is one pipe. Call it from the main thread.

    Raises:
        EnvironmentProblem: when the path of a socket is longer than the system takes.
    """
    backends = options.run / "backends"
    _link_backend(installation, backends / "python")
    for socket in (options.grpc_socket, options.metrics_socket):
        if len(os.fsencode(socket)) > _MAX_SOCKET_PATH:
            most = _MAX_SOCKET_PATH
            raise EnvironmentProblem(f"{socket}: a socket's path may have {most} bytes; set TMPDIR to a shorter one")
        socket.unlink(missing_ok=True)  # of one that was killed
    command = [str(installation.binary), *_flags(options, backends)]
    close_memory = memory_filter()

    def prepare() -> None:
        die_with_parent()
        close_memory()

    return subprocess.Popen(
        command,
        env=_environment(installation, options),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is for this process, which tells the others in order
        preexec_fn=prepare,
    )


def _link_backend(installation: Installation, folder: Path) -> None:
    if folder.is_dir():
        return
    folder.mkdir(parents=True)
    for path in (*installation.backend.glob("*.so"), *installation.backend.glob("*.py"), installation.stub):
        (folder / path.name).symlink_to(path)


def _flags(options: TritonOptions, backends: Path) -> list[str]:
    return [
        f"--model-repository={options.repository}",
        f"--backend-directory={backends}",
        "--model-control-mode=explicit",  # for `oarlock admin`, through the socket
        *(f"--load-model={model}" for model in options.models),
        "--allow-http=false",
        *(f"--grpc-address=unix:{options.run / _GRPC}", "--grpc-port=1"),
        *(f"--metrics-address=unix:{options.metrics_socket}", "--metrics-port=2"),
        f"--grpc-restricted-protocol={_CLOSED}:oarlock-closed={secrets.token_hex(16)}",
        "--allow-gpu-metrics=false",
        f"--log-info={str(options.verbose).lower()}",
        f"--exit-timeout-secs={max(1, round(options.drain_seconds))}",
        f"--backend-config=python,shm-region-prefix-name={options.memory_prefix}",
    ]


def _environment(installation: Installation, options: TritonOptions) -> dict[str, str]:
    environment = dict(os.environ)
    paths = [str(path) for path in installation.libraries]
    paths += filter(None, [environment.get("LD_LIBRARY_PATH")])
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
    # The stub finds its packages as any embedded Python does: by the python3 that comes first.
    folder = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([folder, environment.get("PATH", os.defpath)])
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the repository stays as it was exported
    environment[LIMITS_VARIABLE] = json.dumps(dict(options.limits))
    environment[RUN_VARIABLE] = str(options.run)
    return environment
