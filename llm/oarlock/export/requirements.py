"""requirements.txt of a Triton repository: what it takes, pinned, and whether one asks for anything else."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from oarlock.errors import ModelError
from oarlock.export.checks.findings import Finding
from oarlock.formats.files import is_missing, read_text

REQUIREMENTS_FILE = "requirements.txt"
# What serving imports; pinned to what is installed here.
_PACKAGES = (
    *("paddlepaddle", "paddlenlp", "aistudio-sdk", "numpy", "protobuf", "pyarrow", "pandas", "datasets", "setuptools"),
    *("tokenizers", "safetensors", "ml_dtypes", "jinja2", "tqdm", "pyyaml", "requests", "pydantic"),
    *("annotated-types", "typing_extensions"),
)
_GPU = "paddlepaddle-gpu"
_GPU_INDEX = "https://www.paddlepaddle.org.cn/packages/stable/"
_MOST_BYTES = 1 << 16
_LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*((==|>=|<=|~=|!=|<|>)\s*[A-Za-z0-9.!+*_-]+\s*,?\s*)*")


def requirements_text() -> str:
    """The lines of the file, as this environment has the packages."""
    lines = ["# On a GPU: paddlepaddle-gpu in the place of paddlepaddle, from " + _GPU_INDEX]
    for name in _PACKAGES:
        for candidate in (name, _GPU) if name == "paddlepaddle" else (name,):
            try:
                lines.append(f"{name}=={metadata.version(candidate).split('+')[0]}")
                break
            except metadata.PackageNotFoundError:
                continue
    return "\n".join(lines) + "\n"


def check_requirements(folder: Path, exported: bool) -> list[Finding]:
    """Lines that install from another place than the index of whoever runs pip, or what no export asks for.

    Args:
        exported: by Oarlock, which asks for its own packages alone.
    """
    path = folder / REQUIREMENTS_FILE
    if is_missing(path):
        problem = "missing: what a Triton image has to install is not said"
        return [Finding("requirements", REQUIREMENTS_FILE, problem, "Export again with --target triton")]
    try:
        lines = read_text(path, limit=_MOST_BYTES, what="list of packages").splitlines()
    except ModelError as error:
        return [Finding("requirements", REQUIREMENTS_FILE, str(error), "Export again with --target triton")]
    own = {_plain(name) for name in (*_PACKAGES, _GPU)}
    for number, line in enumerate(lines, 1):
        asked = re.sub(r"(^|\s)#.*", "", line).strip()
        found = _LINE.fullmatch(asked)
        problem = ""
        if asked and not found:
            problem = f"{asked[:80]!r} is not the name of a package with its version, and pip would do what it says"
        elif found and exported and _plain(found["name"]) not in own:
            problem = f"{asked[:80]!r} is no package that an export asks for, and installing it runs its code"
        if problem:
            return [Finding("requirements", f"{REQUIREMENTS_FILE}:{number}", problem, "Take the line out")]
    return []


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
