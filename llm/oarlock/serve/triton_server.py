"""The tritonserver of the nvidia-pytriton wheel: found, started on a model repository, waited for, ended."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from oarlock.environment import die_with_parent
from oarlock.errors import EnvironmentProblem
from oarlock.serve.settings import LIMITS_VARIABLE, RUN_VARIABLE

_INSTALL = "pip install 'oarlock[serve]'"
ADMIN_HEADER = "oarlock-admin-key"


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
class Ports:
    """Where a server listens; of Triton and of the OpenAI-compatible endpoint."""

    grpc: int = 8001
    rest: int = 8000
    metrics: int = 8002
    openai: int = 8080


@dataclass(frozen=True)
class TritonOptions:
    """How to start it.

    Attributes:
        repository: model repository.
        models: of it that are loaded.
        limits: of requests, over those of the repository (fields of Settings).
        run: a folder of this server alone, for the backend's links and what the models tell.
        memory_prefix: of its areas of shared memory.
        admin_key: that changes of the repository have to bring, in the header oarlock-admin-key; "" for none.
        drain_seconds: for requests in flight when it is told to stop.
    """

    repository: Path
    models: tuple[str, ...]
    host: str
    ports: Ports
    limits: Mapping[str, Any]
    run: Path
    memory_prefix: str
    admin_key: str = ""
    drain_seconds: float = 30.0
    verbose: bool = False


def start_triton(installation: Installation, options: TritonOptions) -> subprocess.Popen[str]:
    """The process; it dies with this one, and its output is one pipe. Call it from the main thread."""
    backends = options.run / "backends"
    (backends / "python").mkdir(parents=True)
    for path in (*installation.backend.glob("*.so"), *installation.backend.glob("*.py"), installation.stub):
        (backends / "python" / path.name).symlink_to(path)
    command = [str(installation.binary), *_flags(options, backends)]
    return subprocess.Popen(
        command,
        env=_environment(installation, options),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is for this process, which tells the others in order
        preexec_fn=die_with_parent,
    )


def _flags(options: TritonOptions, backends: Path) -> list[str]:
    host, ports = options.host, options.ports
    # Shared memory, tracing and logging settings let a client reach into this machine; nobody has this key.
    restricted = {"shared-memory,trace,logging": secrets.token_hex(16)}
    if options.admin_key:  # loading a model may bring its code along
        restricted["model-repository"] = options.admin_key
    return [
        f"--model-repository={options.repository}",
        f"--backend-directory={backends}",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in options.models),
        *(f"--grpc-address={host}", f"--grpc-port={ports.grpc}"),
        *(f"--http-address={host}", f"--http-port={ports.rest}"),
        *(f"--metrics-address={host}", f"--metrics-port={ports.metrics}"),
        *(f"--http-restricted-api={apis}:{ADMIN_HEADER}={key}" for apis, key in restricted.items()),
        *(f"--grpc-restricted-protocol={apis}:{ADMIN_HEADER}={key}" for apis, key in restricted.items()),
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


def is_ready(host: str, port: int) -> bool:
    """Whether Triton answers and has loaded its models."""
    return answers(f"http://{url_host(host)}:{port}/v2/health/ready")


def answers(url: str) -> bool:
    """Whether a GET brings a 200."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
        return bool(answer.status == 200)
    return False


def url_host(host: str) -> str:
    """A host as it is reached from here, as it stands in a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
