"""Finds the tritonserver of the nvidia-pytriton wheel, and starts it on a model repository."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from oarlock.environment.signals import die_with_parent
from oarlock.errors import EnvironmentProblem
from oarlock.serve.config import SETTINGS_VARIABLE, ServeConfig, TritonConfig
from oarlock.serve.supervision.private_memory import make_memory_filter
from oarlock.serve.supervision.run_folder import RUN_VARIABLE

_INSTALL = "pip install 'oarlock[serve]'"
_MAX_SOCKET_PATH = 107  # of sockaddr_un, less the NUL at the end
# Calls that reach into the machine, or change its log. Nobody knows their key.
_CLOSED = "shared-memory,trace,logging"


@dataclass(frozen=True)
class Installation:
    """The installed parts of Triton.

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
        """Find the installation in the running Python.

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
        # The stub is linked to libpython, which Debian and others have in a package of its own.
        library = f"libpython{version}.so.1.0"
        if not any((folder / library).is_file() for folder in found.libraries):
            try:
                ctypes.CDLL(library)
            except OSError as error:
                raise EnvironmentProblem(
                    f"{library} is missing, which Triton's Python models need (Debian, Ubuntu: apt-get install "
                    f"libpython{version}; pyenv: a Python built with --enable-shared)"
                ) from error
        return found


def start_triton(installation: Installation, config: ServeConfig, models: Sequence[str]) -> subprocess.Popen[str]:
    """Start the process. It dies with this one, and its output is one pipe. To be called from the main thread.

    Args:
        models: of the repository that are loaded.

    Raises:
        EnvironmentProblem: when the path of a socket is longer than the system takes.
    """
    triton = config.triton
    backend = Path(triton.run, "backends", "python")
    if not backend.is_dir():
        backend.mkdir(parents=True)
        for path in (*installation.backend.glob("*.so"), *installation.backend.glob("*.py"), installation.stub):
            (backend / path.name).symlink_to(path)
    for socket in (triton.grpc_socket, triton.metrics_socket):
        if len(os.fsencode(socket)) > _MAX_SOCKET_PATH:
            most = _MAX_SOCKET_PATH
            raise EnvironmentProblem(f"{socket}: a socket's path may have {most} bytes; set TMPDIR to a shorter one")
        socket.unlink(missing_ok=True)  # of one that was killed
    command = [str(installation.binary), *_flags(config, models)]
    close_memory = make_memory_filter()

    def prepare() -> None:
        die_with_parent()
        close_memory()

    return subprocess.Popen(
        command,
        env=_make_environment(installation, triton),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is for this process, which stops the others in order
        preexec_fn=prepare,
    )


def _flags(config: ServeConfig, models: Sequence[str]) -> list[str]:
    triton = config.triton
    return [
        f"--model-repository={triton.shown_repository}",
        f"--backend-directory={triton.run}/backends",
        "--model-control-mode=explicit",  # for `oarlock admin`, through the socket
        *(f"--load-model={model}" for model in models),
        "--allow-http=false",
        *(f"--grpc-address=unix:{str(triton.grpc_socket).removesuffix(':1')}", "--grpc-port=1"),
        *(f"--metrics-address=unix:{triton.metrics_socket}", "--metrics-port=2"),
        f"--grpc-restricted-protocol={_CLOSED}:oarlock-closed={secrets.token_hex(16)}",
        "--allow-gpu-metrics=false",
        f"--log-info={str(triton.verbose).lower()}",
        f"--exit-timeout-secs={max(1, round(config.drain_seconds))}",
        f"--backend-config=python,shm-region-prefix-name={triton.memory_prefix}",
    ]


def _make_environment(installation: Installation, config: TritonConfig) -> dict[str, str]:
    environment = dict(os.environ)
    paths = [str(path) for path in installation.libraries]
    paths += filter(None, [environment.get("LD_LIBRARY_PATH")])
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
    # The stub finds its packages as any embedded Python does: by the first python3 on PATH.
    folder = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([folder, environment.get("PATH", os.defpath)])
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the repository stays as it was exported
    environment[SETTINGS_VARIABLE] = json.dumps(dict(config.settings))
    environment[RUN_VARIABLE] = config.run
    return environment
