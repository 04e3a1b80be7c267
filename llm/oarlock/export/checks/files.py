"""Check an exported folder for links, foreign files, foreign code and a changed start script."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from oarlock import __version__
from oarlock.errors import ModelError
from oarlock.export.checks.findings import Finding, format_value, shown
from oarlock.export.manifest import MANIFEST_FILE, read_manifest
from oarlock.export.servers import SERVED_NAME
from oarlock.export.start_scripts import START_FILE, format_start_script, read_adapter_ranks
from oarlock.formats.files import read_bytes
from oarlock.formats.links import find_foreign_entries
from oarlock.triton_repository.model_code import LIBRARY, find_foreign_code

_EXPORT = "Export the model again with `oarlock export`"
_STARTED = ("vllm", "fastdeploy")  # targets with a start script
_SCRIPT_BYTES = 1 << 16
_NAME = re.compile(r"^NAME=\$\{NAME:-(?P<name>[^}\n]*)\}", re.MULTILINE)
# Other files of a model folder on a hub, which no server runs.
_KNOWN = ("README*", "LICENSE*", "NOTICE*", ".gitattributes", ".gitignore")
_OTHERS_FIND = ("*.safetensors", "*.safetensors.index.json")  # see check_weights
_CODE = (
    *("*.py", "*.pyc", "*.pyd", "*.ipynb", "*.sh", "*.so", "*.so.*", "*.dylib", "*.dll", "*.exe", "*.ps1", "*.bat"),
    *("*.pkl", "*.pickle", "*.pth", "*.pt", "dockerfile*", "makefile"),
)
# The files of an exported Triton repository, and those of them that are compared with this version's code.
_IN_REPOSITORY = re.compile(r"requirements\.txt|[^/]+/(config\.pbtxt|1/(model\.py|(lib/oarlock|model|adapters)/.+))")
_COMPARED = re.compile(r"[^/]+/1/(model\.py|lib/oarlock/.+)")


def check_files(folder: Path, server: str, config: Mapping[str, Any] | str, known: tuple[str, ...]) -> list[Finding]:
    """Find files that are not part of the export, and a start script that was not written for this model.

    Args:
        server: whose rules apply.
        config: the result of read_object() for config.json.
        known: patterns of files that another check reports.
    """
    try:
        manifest = read_manifest(folder) if os.path.lexists(folder / MANIFEST_FILE) else None
    except ModelError as error:
        return [Finding("manifest", MANIFEST_FILE, str(error), _EXPORT)]
    return _check_start(folder, server, config, manifest) + _check_foreign(folder, manifest, known)


def check_places(folder: Path) -> list[Finding]:
    """Find links that lead out of the folder, pipes and other special files."""
    found = []
    for entry in find_foreign_entries(folder, hidden=True):
        place = entry.path.relative_to(folder).as_posix()
        if not place.startswith(".git/"):
            problem = f"{entry.reason}; its content is not part of the export"
            found.append(Finding("link", place, problem, "Delete it, or replace it by the file"))
    return found


def check_repository_files(folder: Path) -> list[Finding]:
    """Find files of a Triton repository that the manifest does not list, and code that is not this version's.

    Triton runs the code. The manifest can't vouch for it, because whoever changed the code could change the manifest.
    """
    try:
        manifest = read_manifest(folder) if os.path.lexists(folder / MANIFEST_FILE) else None
    except ModelError as error:
        return [Finding("manifest", MANIFEST_FILE, str(error), _EXPORT)]
    if manifest is not None:
        return _check_foreign(folder, manifest, (), is_repository=True) + _check_code(folder, manifest)
    libraries = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.so*"))]
    problem = "a library, which Triton loads if the configuration names it as the backend"
    return [Finding("foreign", shown(libraries), problem, "Delete it")] * bool(libraries)


def _check_code(folder: Path, manifest: Mapping[str, Any]) -> list[Finding]:
    written = manifest.get("versions", {}).get("oarlock")
    if written != __version__:
        problem = f"written by oarlock {format_value(written)}; this is {__version__}, so the code can't be compared"
        return [Finding("code", f"*/1/{LIBRARY}", problem, _EXPORT)]
    changed = find_foreign_code(folder)
    problem = f"not the code of oarlock {__version__}, and Triton would run it"
    return [Finding("code", shown(changed), problem, f"Read it, or: {_EXPORT}")] * bool(changed)


def _check_start(
    folder: Path, server: str, config: Mapping[str, Any] | str, manifest: Mapping[str, Any] | None
) -> list[Finding]:
    """Compare start.sh, which users run, with what this version writes for this config.json."""
    path, files = folder / START_FILE, (manifest or {}).get("files", {})
    if not os.path.lexists(path):
        problem = "missing, though the manifest lists it"
        return [Finding("start", START_FILE, problem, _EXPORT)] * (START_FILE in files)
    target = (manifest or {}).get("target", server)
    if target not in _STARTED:
        problem = f"an export for {target} has no start script, so somebody added this one"
        return [Finding("start", START_FILE, problem, "Delete it")]
    if isinstance(config, str):
        return []  # another check reports it
    try:
        text = read_bytes(path, limit=_SCRIPT_BYTES, what="a start script", error=ModelError).decode("utf-8")
        said = _NAME.search(text)
        name = str((manifest or {}).get("name") or (said["name"] if said else ""))
        expected = format_start_script(
            target, config, name if SERVED_NAME.fullmatch(name) else "oarlock", read_adapter_ranks(folder)
        )
    except (ModelError, UnicodeDecodeError) as error:
        return [Finding("start", START_FILE, f"can't be compared with the expected script: {error}", _EXPORT)]
    own, wanted = text.splitlines(), expected.splitlines()
    if text == expected:
        return []
    line = next((i for i, (a, b) in enumerate(zip(own, wanted, strict=False)) if a != b), min(len(own), len(wanted)))
    problem = "differs from the script that `oarlock export` writes for this config.json"
    return [Finding("start", f"{START_FILE}:{line + 1}", problem, f"Read it, or: {_EXPORT}")]


def _check_foreign(
    folder: Path, manifest: Mapping[str, Any] | None, known: tuple[str, ...], is_repository: bool = False
) -> list[Finding]:
    """Find files that the manifest does not list, and code that no export has. Without a manifest, find code only."""
    own = {MANIFEST_FILE} if is_repository else {MANIFEST_FILE, START_FILE}
    for name in (manifest or {}).get("files", {}):
        # A manifest can't vouch for code that is not compared.
        is_expected = not is_repository or _IN_REPOSITORY.fullmatch(name)
        is_compared = is_repository and _COMPARED.fullmatch(name)
        if is_expected and (is_compared or not _is_code(name.rpartition("/")[2])):
            own.add(name)
    found = []
    for path in sorted(folder.rglob("*")):
        name, parts = path.relative_to(folder).as_posix(), path.relative_to(folder).parts
        if name in own or parts[0] == ".git" or not stat.S_ISREG(path.lstat().st_mode):
            continue
        if any(fnmatch(path.name, pattern) for pattern in (*_KNOWN, *_OTHERS_FIND, *known)):
            continue
        if manifest is not None or _is_code(path.name):
            found.append(name)
    if not found:
        return []
    problem = "not a file of the export" if manifest is not None else "code, which is never part of a model"
    return [Finding("foreign", shown(found), f"{problem}; a program that reads the folder may use it", "Delete it")]


def _is_code(name: str) -> bool:
    return any(fnmatch(name.lower(), pattern) for pattern in _CODE)
