"""Downloads a file over HTTP, completely or not at all: checks size and checksum, and resumes after an interruption."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urljoin, urlsplit

from oarlock.errors import ModelError, first_line
from oarlock.files import settle_file

if TYPE_CHECKING:
    from requests import Response

_TIMEOUT_S = (10.0, 30.0)  # to connect; between two chunks of a response
_PAUSE_S = 1.0  # between two attempts
_TRIES = 5  # consecutive attempts without new data
_MOST_REDIRECTS = 5
_BLOCK = 1 << 20
_SPARE_BYTES = 50_000_000  # of disk space that stay free
_MISSING = (401, 403, 404, 410)  # some stores answer "forbidden" for files they lack
_NO_HEAD = (405, 501)
_SHA256, _MD5 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class RemoteFile:
    """A file as its server describes it.

    Attributes:
        size: None if the server does not tell.
        tag: changes with the content (ETag), "" if there is none.
        checksum: name of the algorithm and hex digest; None if there is none.
    """

    url: str
    size: int | None
    tag: str
    checksum: tuple[str, str] | None


def look_up_file(url: str) -> RemoteFile | None:
    """Ask a server about a file. None if it does not have it.

    Raises:
        ModelError: when the server can't be asked.
    """
    with _open_response("HEAD", url) as answer:
        status, headers = answer.status_code, answer.headers
    if status in _NO_HEAD:
        with _open_response("GET", url) as answer:
            status, headers = answer.status_code, answer.headers
    if status in _MISSING:
        return None
    if status != 200:
        raise ModelError(f"{url}: the server answers with status {status}")
    length = headers.get("Content-Length", "")
    size = int(length) if length.isascii() and length.isdigit() and len(length) < 16 else None
    return RemoteFile(url, size, headers.get("ETag", ""), _find_checksum(headers))


def _find_checksum(headers: Any) -> tuple[str, str] | None:
    """The strongest of: a SHA-256 (Git LFS) as ETag, Content-MD5, an MD5 as ETag (Baidu's store)."""
    for name in ("X-Linked-Etag", "ETag"):
        tag = headers.get(name, "").strip('"').lower()
        if _SHA256.fullmatch(tag):
            return "sha256", tag
    with contextlib.suppress(binascii.Error, ValueError):
        digest = base64.b64decode(headers.get("Content-MD5", ""), validate=True)
        if len(digest) == 16:
            return "md5", digest.hex()
    tag = headers.get("ETag", "").strip('"').lower()
    return ("md5", tag) if "x-bce-request-id" in headers and _MD5.fullmatch(tag) else None


def check_sizes(files: Sequence[RemoteFile], folder: Path, most: Callable[[RemoteFile], int]) -> None:
    """Refuse files that are too large for their kind or for the disk, before any byte is transferred.

    Args:
        folder: an existing folder for the files.
        most: returns the largest size of a file.

    Raises:
        ModelError: with the sizes.
    """
    for file in files:
        if file.size is not None and file.size > most(file):
            raise ModelError(f"{file.url}: {file.size:,} bytes, too large for such a file (at most {most(file):,})")
    needed, free = sum(file.size or 0 for file in files) + _SPARE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(f"{folder}: the files take {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free there")


def download(file: RemoteFile, target: Path, most: int, progress: Callable[[int], Any]) -> None:
    """Download a file and rename it once it is complete. Partial data is kept next to it for the next try.

    Args:
        target: in an existing folder.
        most: largest number of bytes to accept.
        progress: called with the number of bytes of each chunk.

    Raises:
        ModelError: when the download fails, its size differs from the announced one, or it has another checksum.
    """
    limit = most if file.size is None else file.size
    key = hashlib.sha256(f"{file.url}\n{file.tag}\n{file.size}".encode()).hexdigest()[:16]
    partial = target.with_name(f".{key}.incomplete")
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b") as place:
        progress(_count_bytes(place))
        _fill(file, place, limit, progress)
        if file.checksum is not None:
            algorithm, wanted = file.checksum
            digest = hashlib.new(algorithm, usedforsecurity=False)
            place.seek(0)
            while block := place.read(_BLOCK):
                digest.update(block)
            if digest.hexdigest() != wanted:
                partial.unlink()
                raise ModelError(
                    f"{file.url}: damaged in transit: its {algorithm} is {digest.hexdigest()}, the server says {wanted}"
                )
    settle_file(partial)
    os.replace(partial, target)


def _fill(file: RemoteFile, place: BinaryIO, limit: int, progress: Callable[[int], Any]) -> None:
    tries = 0
    while file.size is None or _count_bytes(place) < file.size:
        before = _count_bytes(place)
        try:
            whole = _receive(file, place, limit, progress)
        except _Interrupted as error:
            tries = 0 if _count_bytes(place) > before else tries + 1
            if tries >= _TRIES:
                raise ModelError(f"{file.url}: cut off {tries} times without any new data ({error})") from error
            time.sleep(_PAUSE_S)
            continue
        if file.size is None and whole:
            return
        tries = 0 if _count_bytes(place) > before else tries + 1
        if tries >= _TRIES:
            raise ModelError(f"{file.url}: {_count_bytes(place):,} bytes arrived, the server announced {file.size:,}")


def _receive(file: RemoteFile, place: BinaryIO, limit: int, progress: Callable[[int], Any]) -> bool:
    """Append the bytes of one response. Returns whether a response of unknown length was complete."""
    from requests import RequestException
    from urllib3.exceptions import HTTPError

    start = _count_bytes(place) if file.size is not None else 0  # only a file of known size can be resumed
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and file.tag and not file.tag.startswith("W/"):
        headers["If-Range"] = file.tag
    with _open_response("GET", file.url, headers) as answer:
        if answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            pass
        elif answer.status_code in (200, 416):  # it can't be resumed or has changed: start over
            progress(-_count_bytes(place))
            place.truncate(0)
            if answer.status_code == 416:
                return False
        elif answer.status_code >= 500:
            raise _Interrupted(f"status {answer.status_code}")
        else:
            raise ModelError(f"{file.url}: the server answers with status {answer.status_code}")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise ModelError(
                f"{file.url}: is encoded as {answer.headers['Content-Encoding'][:40]!r}, which was not requested"
            )
        ends = "Content-Length" in answer.headers or answer.headers.get("Transfer-Encoding", "").lower() == "chunked"
        if file.size is None and not ends:
            raise ModelError(
                f"{file.url}: the server does not announce the file's size, so an interruption could not be detected"
            )
        place.seek(0, os.SEEK_END)
        try:
            while block := answer.raw.read(min(_BLOCK, limit - place.tell() + 1)):
                if place.tell() + len(block) > limit:
                    raise ModelError(f"{file.url}: the server sends more than the announced or allowed {limit:,} bytes")
                place.write(block)
                progress(len(block))
        except (RequestException, HTTPError, ConnectionError, TimeoutError) as error:
            raise _Interrupted(first_line(error)) from error
        finally:
            place.flush()
    return True


class _Interrupted(Exception):
    """A response that ended too early."""


@contextlib.contextmanager
def _open_response(method: str, url: str, headers: dict[str, str] | None = None) -> Iterator[Response]:
    """Open a response after following redirects, which may only lead to http or https. Its body is not read yet."""
    import requests

    secure = False
    with requests.Session() as session:
        for _ in range(_MOST_REDIRECTS + 1):
            try:
                scheme = urlsplit(url).scheme if urlsplit(url).hostname else ""
            except ValueError:
                scheme = ""
            if scheme not in ("http", "https") or (secure and scheme != "https"):
                raise ModelError(f"{url[:200]}: files are only downloaded from http and https addresses")
            secure = scheme == "https"
            try:
                answer = session.request(
                    method, url, headers={"Accept-Encoding": "identity", **(headers or {})}, stream=True,
                    timeout=_TIMEOUT_S, allow_redirects=False,
                )  # fmt: skip
            except (requests.RequestException, OSError, ValueError) as error:
                if headers is not None:  # in the middle of a download
                    raise _Interrupted(first_line(error)) from error
                raise ModelError(f"{url}: can't be reached ({first_line(error)})") from error
            if not answer.is_redirect:
                try:
                    yield answer
                finally:
                    answer.close()
                return
            answer.close()
            try:
                url = urljoin(url, answer.headers["Location"])
            except ValueError:  # the next iteration reports it
                url = answer.headers["Location"]
    raise ModelError(f"{url[:200]}: redirected more than {_MOST_REDIRECTS} times")


def _count_bytes(place: BinaryIO) -> int:
    return os.fstat(place.fileno()).st_size
