"""Ends the work for a client that has disconnected."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive


class EndsWithClient:
    """`async with EndsWithClient(receive) as client:` cancels the block when the client disconnects.

    The request must have been read to its end. The block then ends without an error, and `client.gone` is true.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.gone = False

    async def __aenter__(self) -> EndsWithClient:
        task = asyncio.current_task()
        assert task is not None  # asyncio runs this
        self._task = task
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._watcher.cancel()
        if self.gone and kind is None:  # the block was done at the same moment; the cancellation is still to come
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                kind = asyncio.CancelledError
        if not (self.gone and kind is not None and issubclass(kind, asyncio.CancelledError)):
            return False
        if hasattr(self._task, "uncancel"):  # Python 3.11
            self._task.uncancel()
        return True

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._task.cancel()
