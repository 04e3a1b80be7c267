"""Check the headers of the weight files of a model in Hugging Face's layout."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oarlock.errors import ModelError, OarlockError
from oarlock.export.checks.config import DTYPES
from oarlock.export.checks.findings import Finding, read_object, shown
from oarlock.export.servers import SERVERS
from oarlock.formats.safetensors_header import DTYPES as ELEMENT_BITS
from oarlock.formats.safetensors_header import read_header
from oarlock.weights.weight_folder import INDEX_NAME

_SINGLE = "model.safetensors"
LEFTOVERS = ("*.pdparams", "*.pdiparams", "*.pdopt", "*.bin", "*.pt", "*.pth", "*.partial", "*.tmp")
_EXPORT = "Export the model again with `oarlock export`"


@dataclass(frozen=True)
class _Stored:
    """A tensor as described in a header."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ELEMENT_BITS[self.dtype] // 8


def check_leftovers(folder: Path) -> list[Finding]:
    """Find weights in formats that a server may prefer, and unfinished files."""
    found = sorted({path.name for pattern in LEFTOVERS for path in folder.glob(pattern)})
    problem = "a server may read it instead of the safetensors (FastDeploy prefers *.pdparams), or it is unfinished"
    return [Finding("leftovers", shown(found), problem, "Delete it")] * bool(found)


def check_weights(folder: Path, config: dict[str, Any] | None, server: str) -> list[Finding]:
    """Find all problems of the weights.

    Args:
        config: content of config.json; None if the architecture is unknown.
        server: whose rules apply.
    """
    findings: list[Finding] = []
    index = read_object(folder / INDEX_NAME)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if isinstance(index, str) and index != "is missing":
        return [Finding("index", INDEX_NAME, f"the file {index}, so no shard is found", _EXPORT)]
    if not shards:
        return [Finding("weights", _SINGLE, f"no weights (neither this file nor {INDEX_NAME} and its shards)", _EXPORT)]
    stored, broken, formats = _read_headers(folder, shards)
    findings += broken + formats
    if isinstance(index, dict):
        findings += _check_index(index, stored, shards, {finding.place for finding in broken})
    elif shards != [_SINGLE]:
        problem = f"{shown(shards)} need {INDEX_NAME} to be found"
        return [*findings, Finding("index", INDEX_NAME, f"missing: {problem}", _EXPORT)]
    if broken:
        return findings  # the tensors of an unreadable file are unknown
    if all(finding.kind == "total-size" for finding in findings):  # other findings would cause missing names
        findings += _check_names(stored, config, server)
    return [*findings, *_check_types(stored, config)]


def check_headers(folder: Path, place: str) -> list[Finding]:
    """Find weight files that can't be read, in any layout.

    Args:
        place: path of the folder for the findings.
    """
    _, broken, _ = _read_headers(folder, sorted(path.name for path in folder.glob("*.safetensors")))
    return [Finding(found.kind, f"{place}/{found.place}", found.problem, found.remedy) for found in broken]


def _read_headers(folder: Path, shards: list[str]) -> tuple[list[tuple[str, _Stored]], list[Finding], list[Finding]]:
    """Read the tensors of all shards; returns them, findings for unreadable files, and findings for other layouts."""
    stored, broken, formats = [], [], []
    for shard in shards:
        try:
            header = read_header(folder / shard)
        except ModelError as error:
            broken.append(Finding("shard", shard, f"unreadable or truncated ({error})", _EXPORT))
            continue
        stored += [(name, _Stored(shard, about.dtype, about.shape)) for name, about in header.tensors.items()]
        if header.metadata.get("format") != "pt":
            problem = (
                f"its metadata has format {header.metadata.get('format')!r}, and transformers reads only 'pt' "
                "('np' is Paddle's layout, with other names and transposed matrices)"
            )
            formats.append(Finding("format", shard, problem, _EXPORT))
    return stored, broken, formats


def _check_index(
    index: dict[str, Any], stored: list[tuple[str, _Stored]], shards: list[str], broken: set[str]
) -> list[Finding]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        return [Finding("index", f"{INDEX_NAME}, weight_map", "not a mapping of names to files", _EXPORT)]
    gone = sorted({file for file in weight_map.values() if file not in shards})
    if gone:
        return [Finding("shard", shown(gone), f"missing, though {INDEX_NAME} names it", _EXPORT)]
    extra = sorted(set(shards) - set(weight_map.values()))
    if extra:
        problem = f"not in {INDEX_NAME}, and readers differ in which files they read"
        return [Finding("index", shown(extra), problem, "Delete it, or export again")]
    places = {(name, about.file) for name, about in stored}
    wrong = sorted(
        name for name, file in weight_map.items() if file not in broken and (name, file) not in places
    ) or sorted(name for name, about in stored if weight_map.get(name) != about.file)
    if wrong:
        problem = f"{shown(wrong)}: not in the file that the index names, so it is not found"
        return [Finding("index", f"{INDEX_NAME}, weight_map", problem, _EXPORT)]
    metadata = index.get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(about.num_bytes for _, about in stored)
    if said != total and not broken:
        problem = f"{said!r}, but the tensors take {total:,} bytes; servers plan memory by it"
        return [Finding("total-size", f"{INDEX_NAME}, metadata.total_size", problem, f"Write {total}")]
    return []


def _check_types(stored: list[tuple[str, _Stored]], config: dict[str, Any] | None) -> list[Finding]:
    as_bits = [name for name, about in stored if about.dtype == "U16"]
    if as_bits:
        problem = "stored as U16 (PaddleNLP's bfloat16), which other programs read as integers"
        return [Finding("u16", shown(as_bits), problem, _EXPORT)]
    others = [
        f"{name} ({about.dtype})"
        for name, about in stored
        if about.dtype not in DTYPES.values() and (len(about.shape) > 1 or name.endswith((".weight", ".bias")))
    ]
    if others:
        problem = f"weights in this layout are {', '.join(DTYPES.values())}; these are quantised or damaged"
        return [Finding("dtype", shown(others), problem, _EXPORT)]
    sizes: Counter[str] = Counter()
    for _, about in stored:
        if about.dtype in DTYPES.values():
            sizes[about.dtype] += about.num_bytes
    wanted = DTYPES.get(str((config or {}).get("torch_dtype") or (config or {}).get("dtype")))
    if wanted and sizes and sizes.most_common(1)[0][0] != wanted:
        found = [f"{dtype} ({size / sizes.total():.0%} of the bytes)" for dtype, size in sizes.most_common()]
        problem = f"the weights are {shown(found)}, and config.json says {wanted}; servers convert them silently"
        return [Finding("dtype", "config.json, torch_dtype", problem, "Write the type of the weights")]
    return []


def _check_names(stored: list[tuple[str, _Stored]], config: dict[str, Any] | None, server: str) -> list[Finding]:
    """Compare the stored weights with those of the architecture: names and shapes."""
    about = SERVERS[server]
    twice = sorted(name for name, count in Counter(name for name, _ in stored).items() if count > 1)
    if twice:
        return [Finding("names", shown(twice), "in several files, and it is undefined which one is used", _EXPORT)]
    if config is None:
        return []
    from oarlock.export.hf_weight_names import compare_names

    try:
        differences = compare_names(config, {name: tensor.shape for name, tensor in stored})
    except OarlockError as error:
        return [Finding("config", "config.json", f"no model can be built from it ({error})", _EXPORT)]
    findings = []
    if differences.missing:
        problem = f"no file has this weight of the architecture: {about.missing}"
        findings.append(Finding("names", shown(differences.missing), problem, _EXPORT))
    if differences.left_over:
        problem = f"the architecture has no such weight: {about.unknown}"
        findings.append(Finding("names", shown(differences.left_over), problem, _EXPORT))
    if differences.shapes:
        findings.append(Finding("shapes", shown(differences.shapes), "not the shape in config.json", _EXPORT))
    return findings
