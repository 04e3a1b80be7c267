"""Downloads files of models by name into PaddleNLP's cache, from its own store (PPNLP_ENDPOINT) or from ModelScope.

Names come from users, but also from an index on the hub, which is not trusted: every file gets a plain file name.
oarlock.hub.http_download transfers the files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from oarlock.environment.console import make_progress_bar
from oarlock.errors import EnvironmentProblem, ModelError, first_line
from oarlock.files import locked
from oarlock.formats.json_file import TOKENIZER_BYTES
from oarlock.formats.names import find_name_problem
from oarlock.hub.http_download import RemoteFile, check_sizes, download, look_up_file

_ENDPOINT = "https://bj.bcebos.com/paddlenlp"
_NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)
_WEIGHTS = (".safetensors", ".pdparams", ".bin")
_MAX_WEIGHT_BYTES = 1 << 40  # of one file
_TRUE = ("1", "y", "yes", "t", "true", "on")


def fetch(name: str, files: Sequence[str]) -> Path | None:
    """Fetch the first of some files that a model on the hub has, from the cache if possible; None if it has none.

    Raises:
        ModelError: for an invalid name, and when a file can't be downloaded.
    """
    _check(name, files)
    place = _find_cache() / name
    for file in files:
        if (place / file).is_file():
            return place / file
    for file in files:
        found = (
            _fetch_from_modelscope(name, file)
            if _is_set("from_modelscope")
            else _fetch_from_store(name, [file], missing_ok=True)
        )
        if found is not None:
            return found
    return None


def fetch_all(name: str, files: Sequence[str]) -> None:
    """Fetch all of some files, after checking that all exist and fit on the disk.

    Raises:
        ModelError: also for a file that the hub does not have.
    """
    _check(name, files)
    if not _is_set("from_modelscope"):
        _fetch_from_store(name, files, missing_ok=False)
        return
    for file in files:
        if _fetch_from_modelscope(name, file) is None:
            raise ModelError(f"model {name}: the hub has no {file}, which its index names")


def _check(name: str, files: Sequence[str]) -> None:
    if not _NAME.fullmatch(name) or ".." in name:
        raise ModelError(f"{name!r} is not a name on a hub (NAME or OWNER/NAME, of letters, digits, '.', '_' and '-')")
    for file in files:
        if problem := find_name_problem(file):
            raise ModelError(f"model {name}: {file!r} is not a valid name of a file to download: {problem}")


def _fetch_from_store(name: str, files: Sequence[str], missing_ok: bool) -> Path | None:
    """Download what is not in the cache yet. Returns the path of the first file."""
    place = _find_cache() / name
    wanted = [file for file in dict.fromkeys(files) if not (place / file).is_file()]
    if wanted and _is_set("AISTUDIO_BOS_OFFLINE"):
        raise ModelError(f"{wanted[0]} is not in the cache, and AISTUDIO_BOS_OFFLINE is set")
    found: list[tuple[str, RemoteFile]] = []
    for file in wanted:
        endpoint = os.environ.get("PPNLP_ENDPOINT", _ENDPOINT).rstrip("/")
        known = look_up_file(f"{endpoint}/models/community/{name}/{quote(file)}")
        if known is not None:
            found.append((file, known))
        elif missing_ok:
            return None
        else:
            raise ModelError(f"model {name}: the hub has no {file}, which its index names")
    try:
        if found:
            place.mkdir(parents=True, exist_ok=True)
            check_sizes([remote for _, remote in found], place, lambda remote: _limit_bytes(remote.url))
            with (
                locked(place / ".download.lock"),
                make_progress_bar(sum(remote.size or 0 for _, remote in found), name, "B", unit_scale=True) as bar,
            ):
                for file, remote in found:
                    if not (place / file).is_file():  # another process downloaded it meanwhile
                        download(remote, place / file, _limit_bytes(file), bar.update)
    except OSError as error:
        raise ModelError(f"{place}: the files can't be written there: {error.strerror or error}") from error
    return place / files[0]


def _limit_bytes(file: str) -> int:
    return _MAX_WEIGHT_BYTES if file.endswith(_WEIGHTS) else TOKENIZER_BYTES


def _find_cache() -> Path:
    from paddlenlp.utils.env import MODEL_HOME

    return Path(MODEL_HOME)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in _TRUE


def _fetch_from_modelscope(name: str, file: str) -> Path | None:
    try:
        from modelscope.hub.errors import NotExistError
        from modelscope.hub.file_download import model_file_download
    except ImportError as error:
        raise EnvironmentProblem(
            "from_modelscope is set, and modelscope is not installed: pip install modelscope"
        ) from error
    try:
        found = Path(model_file_download(name, file))
    except NotExistError:
        return None
    except Exception as error:  # it raises its own classes, those of requests, OSError, ValueError
        raise ModelError(f"{name}: {file} could not be downloaded from ModelScope ({first_line(error)})") from error
    if found.name != file or not found.is_file():
        raise ModelError(f"{name}: ModelScope's client put {file} at {found}, which is not a file of that name")
    return found
