"""A client's stream of requests, several of which are answered at once: order and number of the answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any


class Stream:
    """The requests of one call."""

    def __init__(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Args: write: sends a message."""
        self._send = write
        self._writing = asyncio.Lock()  # gRPC takes one message at a time
        self._tasks: set[asyncio.Task[Any]] = set()
        self._last_in_order: asyncio.Task[Any] | None = None

    async def write(self, message: bytes) -> None:
        """Send a message. Waits for a client that reads slowly."""
        async with self._writing:
            await self._send(message)

    def add(self, answers: AsyncGenerator[bytes, None], in_order: bool) -> None:
        """Send the answers to a request, concurrently with those of others.

        Args:
            in_order: send them after those of earlier requests that are in order too. Clients of models with one answer
                expect that.
        """
        task = asyncio.create_task(self._send_answers(answers, in_order, self._last_in_order))
        if in_order:
            self._last_in_order = task
        self._tasks.add(task)

    async def _send_answers(
        self, answers: AsyncGenerator[bytes, None], in_order: bool, before: asyncio.Task[Any] | None
    ) -> None:
        if not in_order:
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    await self.write(answer)
            return
        held = [answer async for answer in answers]
        if before is not None:
            await asyncio.wait((before,))
        for answer in held:
            await self.write(answer)

    async def wait_below(self, count: int) -> None:
        """Wait until fewer than `count` requests are being answered.

        Raises:
            Exception: an unexpected one of a request that could not be answered.
        """
        while True:
            done = {task for task in self._tasks if task.done()}
            self._tasks -= done
            for task in done:
                task.result()
            if len(self._tasks) < count:
                return
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    async def cancel(self) -> None:
        """Cancel the requests that have not been answered."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
