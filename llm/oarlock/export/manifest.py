"""What an exported folder is, written into it: where it comes from, the hash of every file, and what was proven."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarlock.errors import ModelError
from oarlock.files import file_sha256, write_json
from oarlock.versions import package_versions

MANIFEST_FILE = "oarlock_export.json"
_FORMAT = 1


def write_manifest(folder: Path, known: Mapping[str, str] | None = None, **facts: Any) -> dict[str, Any]:
    """Write oarlock_export.json for what is in a folder now.

    Args:
        known: SHA-256 of files that need not be read again (those that were just written), by their path in the folder.
        facts: source, target, proof, ...: anything JSON can hold. A "template" is added from the folder's
            chat_template.jinja where none is given.

    Returns:
        The content written: format, the facts, files (path -> bytes and sha256), versions.
    """
    folder, known = Path(folder), known or {}
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST_FILE:
            files[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or file_sha256(path)}
    template = folder / "chat_template.jinja"
    facts.setdefault("template", template.read_text(encoding="utf-8") if template.is_file() else None)
    content = {"format": _FORMAT, **facts, "files": files, "versions": package_versions()}
    write_json(folder / MANIFEST_FILE, content)
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a folder's manifest.

    Raises:
        ModelError: when there is none, or it is not one this version reads.
    """
    path = Path(folder) / MANIFEST_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ModelError(f"{path}: format {content['format']}, this version reads {_FORMAT}")
        return content
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: no {MANIFEST_FILE} in this folder: `oarlock` did not export it") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a manifest: {error!r}") from error


def changed_files(folder: Path) -> list[str]:
    """One sentence for each file that is no longer what the manifest says, or is gone.

    Raises:
        ModelError: when there is no manifest.
    """
    found = []
    for name, about in read_manifest(folder)["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != about["bytes"]:
            found.append(f"{name} has {path.stat().st_size:,} bytes, the manifest says {about['bytes']:,}")
        elif file_sha256(path) != about["sha256"]:
            found.append(f"{name} has another SHA-256 than the manifest says")
    return found
