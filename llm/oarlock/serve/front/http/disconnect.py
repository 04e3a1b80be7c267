"""Ends the work for a client that has disconnected."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive


class EndsWithClient:
    """`async with EndsWithClient(receive) as client:` cancels what is in the block when the client goes away.

    The request has to be read to its end. The block is then left without an error, and `client.gone` is true.
    """

    def __init__(self, receive: Receive) -> None:
        """Of the client whose messages these are."""
        self._receive = receive
        self.gone = False

    async def __aenter__(self) -> EndsWithClient:
        """Begin to look."""
        task = asyncio.current_task()
        assert task is not None  # asyncio runs this
        self._task = task
        self._look = asyncio.create_task(self._look_for_end())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Look no more."""
        self._look.cancel()
        if self.gone and kind is None:  # what is in the block was done at the same moment; the end comes all the same
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                kind = asyncio.CancelledError
        if not (self.gone and kind is not None and issubclass(kind, asyncio.CancelledError)):
            return False
        if hasattr(self._task, "uncancel"):  # Python 3.11
            self._task.uncancel()
        return True

    async def _look_for_end(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._task.cancel()
