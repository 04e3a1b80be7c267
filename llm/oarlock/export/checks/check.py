"""Check an exported folder by the rules of the server that will read it."""

from __future__ import annotations

from pathlib import Path

from oarlock.errors import ConfigError, ModelError
from oarlock.export.checks.config import check_config, check_tokenizer
from oarlock.export.checks.files import check_files, check_places
from oarlock.export.checks.findings import Finding, read_object
from oarlock.export.checks.triton import check_repository, is_repository
from oarlock.export.checks.weights import LEFTOVERS, check_leftovers, check_weights
from oarlock.export.manifest import find_changed_files, read_manifest
from oarlock.export.servers import SERVERS, TRITON


def guess_server(folder: Path) -> str:
    """Return the server that a folder was exported for; "hf" if that is unknown.

    Raises:
        ConfigError: when no server reads the folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"--check {folder}: no such folder")
    if is_repository(folder):
        return TRITON
    try:
        target = read_manifest(folder).get("target")
    except ModelError:
        target = None
    if target in ("peft", "paddle-inference", "paddle"):
        raise ConfigError(
            f"--check {folder}: exported for {target}, which has no rules to check by (--server chooses a server)"
        )
    return target if target in SERVERS else "hf"


def check_folder(folder: Path, server: str, hashes: bool = False) -> list[Finding]:
    """Find all problems, most important first. Only the headers of weight files are read.

    Args:
        server: whose rules apply.
        hashes: compare every file with the manifest as well.
    """
    findings = check_repository(folder) if server == TRITON else check_model(folder, server)
    if hashes:
        findings += [
            Finding("changed", sentence.split(" ")[0], sentence, "Export or copy it again")
            for sentence in find_changed_files(folder)
        ]
    return findings


def check_model(folder: Path, server: str) -> list[Finding]:
    """Find the problems of a model in Hugging Face's layout."""
    if foreign := check_places(folder):
        return foreign  # no file is read through a link
    config = read_object(folder / "config.json")
    findings = check_config(config, server)
    unknown = isinstance(config, str) or any(finding.kind in ("architecture", "config", "rope") for finding in findings)
    known = None if unknown or isinstance(config, str) else config
    return [
        *findings,
        *check_files(folder, server, config, LEFTOVERS),
        *check_weights(folder, known, server),
        *check_leftovers(folder),
        *check_tokenizer(folder, config),
    ]
