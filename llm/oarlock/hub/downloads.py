"""Files of models on hubs, by name, into PaddleNLP's cache: on its own store (PPNLP_ENDPOINT), or ModelScope's hub.

Names come from users, but also from an index, which is the hub's word: a file has the plain name of a file, whatever
the hub says. See oarlock.hub.http_download for how a file comes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from oarlock.environment.console import progress_bar
from oarlock.errors import EnvironmentProblem, ModelError, first_line
from oarlock.files import locked
from oarlock.formats.json_file import TOKENIZER_BYTES
from oarlock.formats.names import name_problem
from oarlock.hub.http_download import RemoteFile, check_sizes, download, look_up_file

_ENDPOINT = "https://bj.bcebos.com/paddlenlp"
_NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)
_WEIGHTS = (".safetensors", ".pdparams", ".bin")
_MOST_WEIGHTS = 1 << 40  # bytes of a file
_TRUE = ("1", "y", "yes", "t", "true", "on")


def fetch(name: str, files: Sequence[str]) -> Path | None:
    """The first of some files that a model on the hub has, from the cache where one is there; None where it has none.

    Raises:
        ModelError: for a name that is none, and when a file can't be downloaded.
    """
    _check(name, files)
    place = _cache() / name
    for file in files:
        if (place / file).is_file():
            return place / file
    for file in files:
        found = _from_modelscope(name, file) if _on("from_modelscope") else _take(name, [file], missing_ok=True)
        if found is not None:
            return found
    return None


def fetch_all(name: str, files: Sequence[str]) -> None:
    """All of some files: none comes before all are known to be there, and to fit on the disk.

    Raises:
        ModelError: also for a file that the hub does not have.
    """
    _check(name, files)
    if not _on("from_modelscope"):
        _take(name, files, missing_ok=False)
        return
    for file in files:
        if _from_modelscope(name, file) is None:
            raise ModelError(f"model {name}: the hub has no {file}, which its index names")


def _check(name: str, files: Sequence[str]) -> None:
    if not _NAME.fullmatch(name) or ".." in name:
        raise ModelError(f"{name!r} is not a name on a hub (NAME or OWNER/NAME, of letters, digits, '.', '_' and '-')")
    for file in files:
        if problem := name_problem(file):
            raise ModelError(f"model {name}: {file!r} is not the name of a file that is downloaded: {problem}")


def _take(name: str, files: Sequence[str], missing_ok: bool) -> Path | None:
    """Download what is not in the cache yet; the place of the first file."""
    place = _cache() / name
    wanted = [file for file in dict.fromkeys(files) if not (place / file).is_file()]
    if wanted and _on("AISTUDIO_BOS_OFFLINE"):
        raise ModelError(f"{wanted[0]} is not in the cache, and AISTUDIO_BOS_OFFLINE is set")
    found: list[tuple[str, RemoteFile]] = []
    for file in wanted:
        remote = look_up_file(_address(name, file))
        if remote is not None:
            found.append((file, remote))
        elif missing_ok:
            return None
        else:
            raise ModelError(f"model {name}: the hub has no {file}, which its index names")
    try:
        _land(name, found, place)
    except OSError as error:
        raise ModelError(f"{place}: the files can't be written there: {error.strerror or error}") from error
    return place / files[0]


def _land(name: str, found: Sequence[tuple[str, RemoteFile]], place: Path) -> None:
    if found:
        place.mkdir(parents=True, exist_ok=True)
        check_sizes([remote for _, remote in found], place, lambda remote: _most(remote.url))
        with (
            locked(place / ".download.lock"),
            progress_bar(sum(remote.size or 0 for _, remote in found), name, "B", unit_scale=True) as bar,
        ):
            for file, remote in found:
                if not (place / file).is_file():  # another process had the lock
                    download(remote, place / file, _most(file), bar.update)


def _most(file: str) -> int:
    return _MOST_WEIGHTS if file.endswith(_WEIGHTS) else TOKENIZER_BYTES


def _address(name: str, file: str) -> str:
    endpoint = os.environ.get("PPNLP_ENDPOINT", _ENDPOINT).rstrip("/")
    return f"{endpoint}/models/community/{name}/{quote(file)}"


def _cache() -> Path:
    from paddlenlp.utils.env import MODEL_HOME

    return Path(MODEL_HOME)


def _on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in _TRUE


def _from_modelscope(name: str, file: str) -> Path | None:
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
