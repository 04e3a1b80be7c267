"""Write and check requirements.txt of a Triton repository: the packages that serving needs, pinned."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from oarlock.errors import ModelError
from oarlock.export.checks.findings import Finding
from oarlock.formats.files import is_missing, read_text

REQUIREMENTS_FILE = "requirements.txt"
# What serving imports, pinned to the installed versions.
_PACKAGES = (
    *("paddlepaddle", "paddlenlp", "aistudio-sdk", "numpy", "protobuf", "pyarrow", "pandas", "datasets", "setuptools"),
    *("tokenizers", "safetensors", "ml_dtypes", "jinja2", "tqdm", "pyyaml", "requests", "pydantic"),
    *("annotated-types", "typing_extensions"),
)
_GPU = "paddlepaddle-gpu"
_GPU_INDEX = "https://www.paddlepaddle.org.cn/packages/stable/"
_MOST_BYTES = 1 << 16
_LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*((==|>=|<=|~=|!=|<|>)\s*[A-Za-z0-9.!+*_-]+\s*,?\s*)*")


def format_requirements() -> str:
    """Format the file with the versions of this environment."""
    lines = ["# On a GPU: paddlepaddle-gpu instead of paddlepaddle, from " + _GPU_INDEX]
    for name in _PACKAGES:
        for candidate in (name, _GPU) if name == "paddlepaddle" else (name,):
            try:
                lines.append(f"{name}=={metadata.version(candidate).split('+')[0]}")
                break
            except metadata.PackageNotFoundError:
                continue
    return "\n".join(lines) + "\n"


def check_requirements(folder: Path, exported: bool) -> list[Finding]:
    """Find lines that install from anywhere but the user's own index, or packages that no export needs.

    Args:
        exported: whether the repository has a manifest of Oarlock, whose exports need known packages only.
    """
    path = folder / REQUIREMENTS_FILE
    if is_missing(path):
        problem = "missing, so the packages that a Triton image needs are unknown"
        return [Finding("requirements", REQUIREMENTS_FILE, problem, "Export again with --target triton")]
    try:
        lines = read_text(path, limit=_MOST_BYTES, what="list of packages").splitlines()
    except ModelError as error:
        return [Finding("requirements", REQUIREMENTS_FILE, str(error), "Export again with --target triton")]
    own = {_normalize(name) for name in (*_PACKAGES, _GPU)}
    for number, line in enumerate(lines, 1):
        asked = re.sub(r"(^|\s)#.*", "", line).strip()
        found = _LINE.fullmatch(asked)
        problem = ""
        if asked and not found:
            problem = f"{asked[:80]!r} is not a package with its version, and pip would execute it"
        elif found and exported and _normalize(found["name"]) not in own:
            problem = f"{asked[:80]!r} is not a package that exports need, and installing it runs its code"
        if problem:
            return [Finding("requirements", f"{REQUIREMENTS_FILE}:{number}", problem, "Remove the line")]
    return []


def _normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
