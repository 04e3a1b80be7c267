"""Versions of the packages that matter, read without importing them."""

from __future__ import annotations

import platform
from importlib import metadata

from oarlock import __version__

_PACKAGES = (
    "paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "visualdl", "numpy", "safetensors", "tokenizers", "datasets",
    "fast_dataindex", "protobuf",
)  # fmt: skip


def read_package_versions() -> dict[str, str]:
    """Return name -> version of the installed packages, Oarlock and Python first."""
    versions = {"oarlock": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def format_versions() -> str:
    """Return the text that `oarlock --version` prints."""
    versions = read_package_versions()
    lines = [f"{name} {version}" for name, version in versions.items()]
    if "paddlepaddle" not in versions and "paddlepaddle-gpu" not in versions:
        lines.append("paddlepaddle: not installed")
    return "\n".join([*lines, f"platform {platform.platform()}"])
