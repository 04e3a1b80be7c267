"""Limits of what may be open at once, in all and for each client: requests over HTTP and gRPC, connections."""

from __future__ import annotations

import hashlib
import ipaddress

_RETRY_SECONDS = 1


class AdmissionRefused(Exception):
    """There is no free slot.

    Attributes:
        retry_after: seconds after which it makes sense to try again.
        is_closing: because the server is about to end, and not because of other clients.
    """

    def __init__(self, message: str, retry_after: int = _RETRY_SECONDS, *, is_closing: bool = False) -> None:
        super().__init__(message)
        self.retry_after, self.is_closing = retry_after, is_closing


class Admission:
    """Counts open requests or connections. To be used in one event loop.

    Attributes:
        num_open: of all clients together.
    """

    def __init__(self, most: int, most_per_client: int, what: str = "requests") -> None:
        """Admit at most so many at once, in all and of each client; `what` they are, in messages."""
        self._most, self._most_per_client, self._what = most, most_per_client, what
        self._open: dict[str, int] = {}
        self.num_open = 0
        self._is_closed = False

    def close(self) -> None:
        """Refuse everybody from now on. What is open continues."""
        self._is_closed = True

    def acquire(self, client: str) -> None:
        """Take a slot, which release() frees.

        Raises:
            AdmissionRefused: when there is none for this client.
        """
        if self._is_closed:
            raise AdmissionRefused("the server is shutting down; try again later", is_closing=True)
        open_here = self._open.get(client, 0)
        if open_here >= self._most_per_client:
            raise AdmissionRefused(f"{open_here} {self._what} of this client are open; try again later")
        if self.num_open >= self._most:
            raise AdmissionRefused(f"{self.num_open} {self._what} are open; try again later")
        self._open[client] = open_here + 1
        self.num_open += 1

    def release(self, client: str) -> None:
        """Free a slot."""
        left = self._open[client] - 1
        if left:
            self._open[client] = left
        else:
            del self._open[client]  # the table keeps nothing of clients that are gone
        self.num_open -= 1


def identify_client(address: str, authorization: bytes | None = None) -> str:
    """The client of a request: its key if keys are required (and this one was accepted), else its address.

    Addresses of IPv6 count by their first 64 bits, of which one machine has all.
    """
    if authorization:
        return "key " + hashlib.blake2b(authorization.strip(), digest_size=16).hexdigest()
    if ":" not in address:
        return address
    try:
        found = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if found.ipv4_mapped:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Network((found.packed[:8] + bytes(8), 64)))
