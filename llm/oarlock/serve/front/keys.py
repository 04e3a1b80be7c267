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
_MOST_BYTES = 1 << 20


class Keys:
    """The keys of a server; any of them opens it."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """None for a server without keys."""
        self._keys: tuple[bytes, ...] = ()
        self.replace(keys)

    def replace(self, keys: Iterable[str]) -> None:
        """From now on these alone."""
        self._keys = tuple(key.encode("ascii") for key in keys)

    def __bool__(self) -> bool:
        """Whether requests have to bring one."""
        return bool(self._keys)

    def __repr__(self) -> str:
        return f"Keys({len(self._keys)} of them)"

    def accept(self, authorization: str | bytes | None) -> bool:
        """Whether a request with this `Authorization` may pass: "Bearer KEY". Every one may where there are no keys.

        Each known key is compared in constant time, and all of them always.
        """
        if not self._keys:
            return True
        given = authorization.encode("utf-8", "replace") if isinstance(authorization, str) else authorization or b""
        scheme, _, key = given.partition(b" ")
        key, found = key.strip(), False
        for known in self._keys:
            found |= hmac.compare_digest(key, known)
        return found and scheme.lower() == b"bearer"


def read_keys(path: Path) -> tuple[str, ...]:
    """Keys of a file, one a line; empty lines and those that begin with # are left out.

    A file that other users may read is warned about.

    Raises:
        ConfigError: when there is none, or one that no header can carry.
    """
    name = f"--api-key-file {path}"
    text = read_text(path, limit=_MOST_BYTES, what="list of API keys", error=ConfigError)
    lines = enumerate(text.splitlines(), 1)
    keys = _checked(((f"{name}:{i}", line) for i, line in lines if not line.startswith("#")), name)
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.info(f"{path} holds API keys and other users may read it (mode {mode:04o}): chmod 600")
    return keys


def take_keys_of_environment() -> tuple[str, ...]:
    """Keys of OARLOCK_API_KEYS, with commas or spaces between them; processes started from now on do not inherit it.

    Raises:
        ConfigError: when it holds none, or one that no header can carry.
    """
    text = os.environ.pop(KEYS_VARIABLE, None)
    if text is None:
        return ()
    words = text.replace(",", " ").split()
    return _checked(((KEYS_VARIABLE, word) for word in words), KEYS_VARIABLE)


def _checked(lines: Iterable[tuple[str, str]], name: str) -> tuple[str, ...]:
    """The keys of (where it stands, text); a message never shows one."""
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


class KeySource:
    """Where the keys of a server come from."""

    def __init__(self, file: Path | None = None, fixed: Iterable[str] = ()) -> None:
        """Args: file: read again by each read(). fixed: keys beside it, as those of the environment."""
        self.file, self._fixed = file, tuple(fixed)

    def __repr__(self) -> str:
        return f"KeySource({self.file}, {len(self._fixed)} beside it)"

    def read(self) -> tuple[str, ...]:
        """All keys as they are now.

        Raises:
            ConfigError: when the file can't be read, or has none.
        """
        found = read_keys(self.file) if self.file else ()
        return tuple(dict.fromkeys((*found, *self._fixed)))
