"""API keys: read from a file or the environment, compared in constant time, replaced while the server runs."""

from __future__ import annotations

import hmac
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from oarlock.environment.console import get_logger
from oarlock.errors import ConfigError
from oarlock.formats.files import read_text

logger = get_logger(__name__)

KEYS_VARIABLE = "OARLOCK_API_KEYS"
_MAX_BYTES = 1 << 20


class Keys:
    """The keys of a server, one of which each request needs. Without keys every request is accepted."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._keys: tuple[bytes, ...] = ()
        self.replace(keys)

    def replace(self, keys: Iterable[str]) -> None:
        """Accept only these keys from now on."""
        self._keys = tuple(key.encode("ascii") for key in keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __repr__(self) -> str:
        return f"Keys({len(self._keys)} of them)"

    def accept(self, authorization: str | bytes | None) -> bool:
        """Check the `Authorization` of a request: "Bearer KEY".

        It is always compared with all keys, each in constant time.
        """
        if not self._keys:
            return True
        given = authorization.encode("utf-8", "replace") if isinstance(authorization, str) else authorization or b""
        scheme, _, key = given.partition(b" ")
        key, found = key.strip(), False
        for known in self._keys:
            found |= hmac.compare_digest(key, known)
        return found and scheme.lower() == b"bearer"


class KeySource:
    """A file of keys, which may change, and keys that do not change."""

    def __init__(self, file: Path | None = None, fixed: Iterable[str] = ()) -> None:
        """Args: file: is read by each read(). fixed: further keys, such as those of the environment."""
        self.file, self._fixed = file, tuple(fixed)

    def __repr__(self) -> str:
        return f"KeySource({self.file}, {len(self._fixed)} fixed)"

    def read(self) -> tuple[str, ...]:
        """Read all keys as they are now.

        Raises:
            ConfigError: when the file can't be read, or has none.
        """
        found = read_keys(self.file) if self.file else ()
        return tuple(dict.fromkeys((*found, *self._fixed)))


def read_keys(path: Path) -> tuple[str, ...]:
    """Read the keys of a file, one per line. Empty lines and those that begin with # are left out.

    A warning is logged if other users may read the file.

    Raises:
        ConfigError: when there is none, or one that no header can carry.
    """
    name = f"--api-key-file {path}"
    text = read_text(path, limit=_MAX_BYTES, what="list of API keys", error=ConfigError)
    lines = enumerate(text.splitlines(), 1)
    keys = _check_keys(((f"{name}:{i}", line) for i, line in lines if not line.startswith("#")), name)
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.info(f"{path} holds API keys and other users may read it (mode {mode:04o}): chmod 600")
    return keys


def take_keys_of_environment() -> tuple[str, ...]:
    """Read OARLOCK_API_KEYS, keys with commas or spaces between them, and remove it: child processes do not inherit it.

    Raises:
        ConfigError: when it holds no key, or one that no header can carry.
    """
    text = os.environ.pop(KEYS_VARIABLE, None)
    if text is None:
        return ()
    words = text.replace(",", " ").split()
    return _check_keys(((KEYS_VARIABLE, word) for word in words), KEYS_VARIABLE)


def _check_keys(lines: Iterable[tuple[str, str]], name: str) -> tuple[str, ...]:
    """The keys of (place, text) pairs, each once. No message shows a key."""
    found: dict[str, None] = {}
    for where, line in lines:
        key = line.strip()
        if not key:
            continue
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{where}: a key may have printable ASCII characters, no spaces")
        found[key] = None
    if not found:
        raise ConfigError(f"{name}: no key in it (one a line)")
    return tuple(found)
