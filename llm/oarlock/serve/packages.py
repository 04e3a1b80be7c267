"""Whether the packages of the extra [serve] are here."""

from __future__ import annotations

from importlib.util import find_spec

from oarlock.errors import EnvironmentProblem

_PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "grpc": "grpcio", "tritonclient": "tritonclient[grpc]"}


def check_installed() -> None:
    """Before anything of them is imported.

    Raises:
        EnvironmentProblem: naming what is missing.
    """
    missing = [package for module, package in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise EnvironmentProblem(f"{', '.join(missing)} not installed: pip install 'oarlock[serve]'")
