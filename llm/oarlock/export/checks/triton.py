"""Check a model repository by Triton's rules. Its configurations are parsed with Triton's own protobuf."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from oarlock.environment.console import log_once
from oarlock.errors import EnvironmentProblem, ModelError
from oarlock.export.checks.files import check_places, check_repository_files
from oarlock.export.checks.findings import Finding, shown
from oarlock.export.checks.weights import check_headers
from oarlock.export.manifest import MANIFEST_FILE
from oarlock.export.requirements import check_requirements
from oarlock.formats.files import is_missing, read_bytes
from oarlock.formats.names import find_name_problem
from oarlock.triton_repository.config_pbtxt import TRITON_CONFIG, read_triton_config

_EXPORT = "Export again with --target triton"
_PYTHON = "python"
_MOST_CODE = 1 << 20  # bytes; ours has 300


def is_repository(folder: Path) -> bool:
    """Return whether Triton would find a model in a folder."""
    return any(folder.glob(f"*/{TRITON_CONFIG}"))


def check_repository(folder: Path) -> list[Finding]:
    """Find the problems of every model in the repository and of their weights."""
    if foreign := check_places(folder):
        return foreign  # no file is read through a link
    models = sorted(path.parent for path in folder.glob(f"*/{TRITON_CONFIG}"))
    if not models:
        return [Finding("repository", str(folder), f"no */{TRITON_CONFIG}, so Triton finds no model", _EXPORT)]
    findings = check_repository_files(folder)
    findings += [finding for model in models for finding in _check_model(model)]
    weights = sorted({path.parent for path in folder.rglob("*.safetensors")})
    for place in weights:
        findings += check_headers(place, str(place.relative_to(folder)))
    if not weights:
        findings.append(Finding("weights", str(folder), "no weights anywhere in the repository", _EXPORT))
    return findings + check_requirements(folder, exported=not is_missing(folder / MANIFEST_FILE))


def _check_model(folder: Path) -> list[Finding]:
    place = f"{folder.name}/{TRITON_CONFIG}"
    config = _parse(folder / TRITON_CONFIG)
    if config is None:
        return []
    if isinstance(config, str):
        return [Finding("pbtxt", place, f"Triton can't read it: {config}", _EXPORT)]
    if config.name and config.name != folder.name:
        problem = f"the model is named {config.name!r} and its folder {folder.name!r}; Triton needs the same name"
        return [Finding("pbtxt", f"{place}, name", problem, f"Write {folder.name!r}")]
    if not (config.backend or config.platform):
        return [Finding("pbtxt", f"{place}, backend", "no backend is set", 'Write backend: "python"')]
    outside = [name for name in ("EXECUTION_ENV_PATH", "TRITON_BATCH_STRATEGY_PATH") if name in config.parameters]
    if outside or config.model_repository_agents.agents or config.model_operations.op_library_filename:
        what = shown([*outside, "model_repository_agents", "model_operations"][: len(outside) or 3])
        problem = f"{what}: it makes Triton run programs or libraries from elsewhere"
        return [Finding("pbtxt", f"{place}, parameters", problem, "Remove it")]
    vague = [
        tensor.name or "?" for tensor in (*config.input, *config.output) if not tensor.data_type or not tensor.dims
    ]
    if vague or not config.input or not config.output:
        problem = f"inputs and outputs need data_type and dims ({', '.join(vague) or 'there are none'})"
        return [Finding("pbtxt", f"{place}, input and output", problem, _EXPORT)]
    return _check_versions(folder, config)


def _parse(path: Path) -> Any:
    """Parse a configuration; returns what is wrong as text, or None if Triton's protobuf is not installed."""
    try:
        return read_triton_config(path)
    except EnvironmentProblem as error:
        log_once(f"{TRITON_CONFIG} is not checked by Triton's own protobuf: {error}")
        return None
    except ModelError as error:
        return str(error)


def _check_versions(folder: Path, config: Any) -> list[Finding]:
    versions = sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit() and path.name != "0")
    if not versions:
        return [Finding("version", f"{folder.name}/1", "no version folder, so Triton loads nothing", _EXPORT)]
    file = config.default_model_filename or ("model.py" if config.backend == _PYTHON else "")
    if file and (problem := find_name_problem(file)):
        place = f"{folder.name}/{TRITON_CONFIG}, default_model_filename"
        return [Finding("pbtxt", place, f"{file[:100]!r} is not the name of a file: {problem}", _EXPORT)]
    findings = []
    for version in versions:
        place = f"{folder.name}/{version.name}/{file}"
        if file and not (version / file).exists():
            findings.append(Finding("version", place, "missing, though the configuration names it", _EXPORT))
        elif file.endswith(".py"):
            findings += _check_code(version / file, place)
    return findings


def _check_code(path: Path, place: str) -> list[Finding]:
    try:
        tree = ast.parse(read_bytes(path, limit=_MOST_CODE, what="model.py"))
    except (ModelError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        return [Finding("code", place, f"not Python: {error}", _EXPORT)]
    # Triton looks the class up by name, so it can be an imported one.
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names |= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    if "TritonPythonModel" in names:
        return []
    return [Finding("code", place, "no class TritonPythonModel, which Triton's Python backend needs", _EXPORT)]
