"""Checks the head of a request: to whom it is addressed, which page sent it, and the form that the routes read.

Web pages of others can send requests to servers on the user's machine. A browser names the page in `Origin` and
`Sec-Fetch-Site`. After DNS rebinding the page seems to be the server's own; then `Host` has the page's name.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from oarlock.serve.front.http.refusal import HttpRefusal, quote

_MAX_HEADERS, _MAX_HEADER_BYTES, _MAX_TARGET_BYTES = 100, 32 << 10, 4 << 10
_ONCE = frozenset(
    (b"host", b"origin", b"content-length", b"transfer-encoding", b"content-type", b"content-encoding",
     b"authorization", b"inference-header-content-length", b"sec-fetch-site")
)  # fmt: skip
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_EVERYWHERE = ("0.0.0.0", "::", "")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ufffd]")  # U+FFFD: what was not UTF-8
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::\d{1,5})?", re.IGNORECASE)
_JSON = re.compile(rb"application/(?:[\w.+-]+\+)?json\s*(?:;.*)?", re.IGNORECASE)
_BINARY = re.compile(rb"application/octet-stream\s*(?:;.*)?", re.IGNORECASE)
HEADER_LENGTH = b"inference-header-content-length"  # of KServe: bytes of the JSON before binary tensors


@dataclass(frozen=True)
class HeadRules:
    """The rules for the heads of a port's requests.

    Attributes:
        names: hosts that requests may be addressed to, from list_server_names().
        is_everywhere: the port is open on all addresses of the machine, each of which is a name of it.
        origins: of web pages that may send requests (scheme://host:port); "*" for all.
        takes_binary: bodies may hold binary tensors after their JSON.
        encodings: of bodies that are read, besides none.
    """

    names: frozenset[str]
    is_everywhere: bool = False
    origins: frozenset[str] = frozenset()
    takes_binary: bool = False
    encodings: Collection[bytes] = field(default=())

    def read(self, scope: Mapping[str, Any]) -> dict[bytes, bytes]:
        """Check the head of a request, and return its headers.

        Raises:
            HttpRefusal: naming what is wrong.
        """
        headers = _read_headers(scope["headers"])
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > _MAX_TARGET_BYTES:
            raise HttpRefusal(414, f"an address may have {_MAX_TARGET_BYTES:,} bytes")
        if not scope["path"].startswith("/") or _CONTROL.search(scope["path"]):
            raise HttpRefusal(400, f"no address of this server: {quote(scope['path'])}")
        if scope["http_version"] not in ("1.0", "1.1"):
            raise HttpRefusal(505, "this server speaks HTTP/1.1 only")
        if b"transfer-encoding" in headers and (b"content-length" in headers or scope["http_version"] == "1.0"):
            # If two programs disagree about the end of a body, a second request can be hidden in it.
            raise HttpRefusal(400, "Transfer-Encoding does not go with Content-Length, or with HTTP/1.0")
        host = headers.get(b"host", b"").decode("latin-1")
        found = _HOST.fullmatch(host)
        name = (found[1] or found[2]).lower() if found else ""
        is_own, server = name in self.names, scope.get("server")
        if not is_own and self.is_everywhere and name and server:
            # An address may be called by itself; only names can be made to point to another address.
            with contextlib.suppress(ValueError):  # of what is no address
                called, own = ipaddress.ip_address(name), ipaddress.ip_address(server[0])
                is_own = called in (own, getattr(own, "ipv4_mapped", None))
        if not is_own:
            how = "if that names this server, add it with --allowed-host"
            raise HttpRefusal(403, f"requests to {quote(host)} are not answered here; {how}")
        origin = headers.get(b"origin")
        if origin is not None:
            page = origin.decode("latin-1")
            if page not in self.origins and "*" not in self.origins:
                raise HttpRefusal(403, f"web pages of {quote(page)} may not use this server (--cors-origin)")
        elif headers.get(b"sec-fetch-site", b"none").strip() not in (b"none", b"same-origin"):
            raise HttpRefusal(403, "web pages of other origins may not use this server (--cors-origin)")
        return headers

    def check_body_kind(self, headers: Mapping[bytes, bytes]) -> None:
        """Refuse bodies of types that are not read here: web pages can send them without permission.

        Raises:
            HttpRefusal: 415.
        """
        kind = headers.get(b"content-type", b"").strip()
        is_binary = self.takes_binary and _BINARY.fullmatch(kind)
        if kind and not is_binary and not _JSON.fullmatch(kind):
            given = quote(kind.decode("latin-1"))
            raise HttpRefusal(415, f"a request needs the header Content-Type: application/json; it says {given}")
        encoding = headers.get(b"content-encoding", b"").strip().lower()
        if encoding not in (b"", b"identity", *self.encodings):
            given = quote(encoding.decode("latin-1"))
            raise HttpRefusal(415, f"Content-Encoding {given} is not read here; send the body as it is")


def list_server_names(host: str, allowed: Iterable[str] = ()) -> frozenset[str]:
    """List the names of a server that listens on `host`: loopback's, its own, and those that the user allows."""
    names = {*_LOOPBACK_NAMES, *(name.strip("[]").lower() for name in allowed)}
    if host not in _LOOPBACK_NAMES:
        names.add(socket.gethostname().lower())
    if host not in _EVERYWHERE:
        names.add(host.strip("[]").lower())
    return frozenset(names)


def is_everywhere(host: str) -> bool:
    return host in _EVERYWHERE


def _read_headers(pairs: Collection[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    if len(pairs) > _MAX_HEADERS or sum(len(name) + len(value) for name, value in pairs) > _MAX_HEADER_BYTES:
        raise HttpRefusal(431, f"a request may have {_MAX_HEADERS} headers of {_MAX_HEADER_BYTES:,} bytes in all")
    headers = dict(pairs)
    if len(headers) != len(pairs):
        seen: set[bytes] = set()
        for name, _ in pairs:
            if name in seen and name in _ONCE:
                raise HttpRefusal(400, f"the header {name.decode('ascii')} is given twice")
            seen.add(name)
    return headers
