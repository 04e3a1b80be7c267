"""How much may be open at once, of each client and in all: requests over HTTP and gRPC, connections."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
from collections.abc import AsyncIterator

_RETRY_SECONDS = 1


class Refused(Exception):
    """There is no place now.

    Attributes:
        retry_after: seconds after which it makes sense to ask again.
        is_closing: because the server is about to end, and not because of others.
    """

    def __init__(self, message: str, retry_after: int = _RETRY_SECONDS, *, is_closing: bool = False) -> None:
        super().__init__(message)
        self.retry_after, self.is_closing = retry_after, is_closing


class Admission:
    """Counts what is open; everything here belongs to one event loop."""

    def __init__(self, most: int, most_per_client: int, what: str = "requests") -> None:
        """For at most so many at once, in all and of each client."""
        self._most, self._most_per_client, self._what = most, most_per_client, what
        self._open: dict[str, int] = {}
        self._num_open = 0
        self._is_closed = False

    @property
    def num_open(self) -> int:
        """Of all clients together."""
        return self._num_open

    def close(self) -> None:
        """From now on everybody is refused; what is open goes on."""
        self._is_closed = True

    def take(self, client: str) -> None:
        """A place, which has to be given back by leave().

        Raises:
            Refused: when there is none for this client.
        """
        if self._is_closed:
            raise Refused("the server is shutting down; try again later", is_closing=True)
        open_here = self._open.get(client, 0)
        if open_here >= self._most_per_client:
            raise Refused(f"{open_here} {self._what} of this client are open; try again later")
        if self._num_open >= self._most:
            raise Refused(f"{self._num_open} {self._what} are open; try again later")
        self._open[client] = open_here + 1
        self._num_open += 1

    def leave(self, client: str) -> None:
        """Give a place back."""
        left = self._open[client] - 1
        if left:
            self._open[client] = left
        else:
            del self._open[client]  # the table holds nothing of clients that are gone
        self._num_open -= 1

    @contextlib.asynccontextmanager
    async def place(self, client: str) -> AsyncIterator[None]:
        """A place for as long as the block lasts.

        Raises:
            Refused: see take().
        """
        self.take(client)
        try:
            yield
        finally:
            self.leave(client)


def client_of(address: str, authorization: bytes | None = None) -> str:
    """Whose a request is: of the key where keys are asked for (and this one was accepted), else of the address.

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
