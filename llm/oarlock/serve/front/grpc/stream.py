"""A client's stream of requests, several of which are answered at once: who writes, in which order, and how many."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any


class Stream:
    """The requests of one call."""

    def __init__(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """With what a message is sent by."""
        self._send = write
        self._writing = asyncio.Lock()  # gRPC takes one message at a time
        self._tasks: set[asyncio.Task[Any]] = set()
        self._last_in_order: asyncio.Task[Any] | None = None

    async def write(self, message: bytes) -> None:
        """To the client; it waits for one that reads slowly."""
        async with self._writing:
            await self._send(message)

    def add(self, answers: AsyncGenerator[bytes, None], in_order: bool) -> None:
        """Send the answers to a request beside those of others.

        Args:
            in_order: after those of the requests before it that are in order too, as clients of models with one answer
                expect that.
        """
        before = self._last_in_order if in_order else None
        task = asyncio.create_task(self._held(answers, before) if in_order else self._passed(answers))
        if in_order:
            self._last_in_order = task
        self._tasks.add(task)

    async def _passed(self, answers: AsyncGenerator[bytes, None]) -> None:
        async with contextlib.aclosing(answers):
            async for answer in answers:
                await self.write(answer)

    async def _held(self, answers: AsyncGenerator[bytes, None], before: asyncio.Task[Any] | None) -> None:
        held = [answer async for answer in answers]
        if before is not None:
            await asyncio.wait((before,))
        for answer in held:
            await self.write(answer)

    async def wait_below(self, count: int) -> None:
        """Until fewer requests than that are being answered.

        Raises:
            Exception: of a request that could not be answered for a reason nobody thought of.
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
        """What is not answered yet."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
