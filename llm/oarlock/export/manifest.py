"""The manifest of an exported folder: its source, the hash of every file, and the results of the proofs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Len
from typing_extensions import NotRequired, TypedDict

from oarlock.errors import ModelError
from oarlock.files import compute_sha256, stream_sha256, write_json
from oarlock.formats.json_file import INDEX_BYTES, read_json_if_there
from oarlock.formats.links import open_inside
from oarlock.formats.names import is_plain_path
from oarlock.versions import read_package_versions

MANIFEST_FILE = "oarlock_export.json"
_FORMAT = 1


class FileFacts(TypedDict):
    """A file of the export."""

    bytes: Annotated[int, Ge(0)]
    sha256: Annotated[str, Len(64, 64)]


class ExportManifest(TypedDict):
    """The fields of oarlock_export.json that programs read. `source` and `proof` are for people."""

    format: int
    files: dict[str, FileFacts]
    versions: NotRequired[dict[str, str]]
    target: NotRequired[str]
    name: NotRequired[str]
    family: NotRequired[str]
    dtype: NotRequired[str]
    template: NotRequired[str | None]


def write_manifest(folder: Path, known: Mapping[str, str] | None = None, **facts: Any) -> dict[str, Any]:
    """Write oarlock_export.json for the current content of a folder.

    Args:
        known: SHA-256 of files that were just written and are not read again, by their path in the folder.
        facts: source, target, proof and so on, as JSON values. "template" defaults to the content of
            chat_template.jinja.

    Returns:
        The content: format, the facts, files (path -> bytes and sha256), versions.
    """
    folder, known = Path(folder), known or {}
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST_FILE:
            files[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or compute_sha256(path)}
    template = folder / "chat_template.jinja"
    facts.setdefault("template", template.read_text(encoding="utf-8") if template.is_file() else None)
    content = {"format": _FORMAT, **facts, "files": files, "versions": read_package_versions()}
    write_json(folder / MANIFEST_FILE, content)
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder.

    Raises:
        ModelError: when there is none, or this version can't read it.
    """
    path = Path(folder) / MANIFEST_FILE
    content = read_json_if_there(path, ExportManifest, limit=INDEX_BYTES, extra="allow")
    if content is None:
        raise ModelError(f"{folder}: no {MANIFEST_FILE} in this folder, so `oarlock` did not export it")
    if content["format"] != _FORMAT:
        raise ModelError(f"{path}: format {content['format']}; this version reads {_FORMAT}")
    for name in content["files"]:
        if not is_plain_path(name):
            raise ModelError(f"{path}: files: {name!r} is not a path in this folder")
    return dict(content)


def find_changed_files(folder: Path) -> list[str]:
    """Describe each file that differs from the manifest or is missing, in one sentence.

    Raises:
        ModelError: when there is no manifest.
    """
    found = []
    for name, about in read_manifest(folder)["files"].items():
        try:
            with open_inside(folder, name) as file:
                size = os.fstat(file.fileno()).st_size
                if size != about["bytes"]:
                    found.append(f"{name} has {size:,} bytes, but {about['bytes']:,} in the manifest")
                elif stream_sha256(file) != about["sha256"]:
                    found.append(f"{name} has another SHA-256 than in the manifest")
        except ModelError as error:
            gone = not os.path.lexists(Path(folder) / name)
            found.append(f"{name} is missing" if gone else f"{name} can't be read ({error})")
    return found
