"""Answers many requests with one model: iteration-level batching (Orca, OSDI 2022).

One thread owns the model. Before each step it takes in what waits, as far as there are places, and leaves out what is
done or was cancelled; so a request waits for a step, not for the answers of others.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oarlock.environment.console import get_logger
from oarlock.serve.engine.decoder import Feed
from oarlock.serve.engine.request import Ticket
from oarlock.serve.engine.sampling_params import (
    Limits,
    Piece,
    Prompt,
    PromptTooLong,
    QueueFull,
    RequestRefused,
    Sampling,
)

if TYPE_CHECKING:
    from oarlock.serve.engine.loading import Served
    from oarlock.serve.engine.prompts import Parsing

logger = get_logger(__name__)

_NO_ADAPTERS: Mapping[str, Path] = {}


class Engine:
    """See the module. All methods may be called from any thread."""

    def __init__(self, served: Served, limits: Limits) -> None:
        """Around a loaded model; see load()."""
        self._served, self._limits = served, limits
        self._context = min(served.context, limits.max_length or served.context)
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="oarlock-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        model: str | Path,
        adapters: Mapping[str, Path] = _NO_ADAPTERS,
        limits: Limits | None = None,
        parse_special_tokens: Parsing = "prompts",
    ) -> Engine:
        """Of a model folder (Paddle's or Hugging Face's layout) with its tokenizer, and LoRA adapters by their names.

        Args:
            parse_special_tokens: where a client's text is read as special tokens, see prompts.py.

        Raises:
            ModelError: when something is missing, or does not belong together.
        """
        from oarlock.serve.engine.loading import open_served

        return cls(open_served(model, adapters, parse_special_tokens), limits or Limits())

    def submit(self, prompt: Prompt, sampling: Sampling, on_piece: Callable[[Piece], None]) -> Ticket:
        """Ask.

        Args:
            on_piece: is called with each piece of the answer from the engine's thread, so it has to be quick; the last
                piece has a finish_reason. When it raises, the request is cancelled.

        Raises:
            RequestRefused: when it can't be answered as it is asked.
            QueueFull: when too many wait, or the engine is closing.
        """
        ticket = self._ticket(prompt, sampling, on_piece)
        with self._changed:
            if self._closing:
                raise QueueFull("the server is closing")
            if len(self._waiting) >= self._limits.max_queue:
                raise QueueFull(f"{len(self._waiting)} requests wait already; try again later")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[Piece]:
        """submit() for a caller with a thread of its own. Leaving the loop early cancels the request."""
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        ticket = self.submit(prompt, sampling, pieces.put)
        try:
            while True:
                piece = pieces.get()
                yield piece
                if piece.finish_reason:
                    return
        finally:
            ticket.cancel()

    def info(self) -> dict[str, Any]:
        """What this engine is, and how busy."""
        with self._changed:
            return {
                "model": self._served.name,
                "adapters": list(self._served.adapters),
                "context": self._context,
                "limits": vars(self._limits),
                "busy": len(self._running),
                "waiting": len(self._waiting),
            }

    def close(self, drain: bool = True) -> None:
        """Take no more requests, and return when the last one is answered.

        Args:
            drain: answer those that are here; else they are cancelled.
        """
        with self._changed:
            self._closing = True
            if not drain:
                for ticket in (*self._waiting, *self._running):
                    ticket.cancel()
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # taking requests in

    def _ticket(self, prompt: Prompt, sampling: Sampling, on_piece: Callable[[Piece], None]) -> Ticket:
        served, limits = self._served, self._limits
        prompt.check()
        sampling = sampling.with_defaults(served.defaults)
        sampling.check()
        if prompt.adapter is not None and prompt.adapter not in served.adapters:
            known = ", ".join(served.adapters) or "none"
            raise RequestRefused(f"there is no adapter {prompt.adapter!r} here (there are: {known})")
        ids = served.encode(prompt)
        room = self._context - len(ids)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(ids):,} tokens; prompt and answer together may have {self._context:,}"
            )
        most = sampling.max_tokens or min(room, limits.max_tokens, sampling.default_tokens or room)
        if most > limits.max_tokens:
            raise RequestRefused(f"max_tokens {most:,} is too many: an answer may have {limits.max_tokens:,}")
        if most > room:
            raise PromptTooLong(
                f"max_tokens {most:,} is too many: a prompt of {len(ids):,} tokens leaves {room:,} of {self._context:,}"
            )
        if sampling.min_tokens > most:
            raise RequestRefused(f"min_tokens {sampling.min_tokens:,} is more than the {most:,} of max_tokens")
        beyond = [token for token in sampling.stop_token_ids if not 0 <= token < served.decoder.vocabulary]
        if beyond:
            raise RequestRefused(f"stop_token_ids: {beyond[0]} is not in the vocabulary")
        if sampling.min_tokens and len({*sampling.stop_token_ids, *served.ends}) >= served.decoder.vocabulary:
            raise RequestRefused("min_tokens: every token of the vocabulary ends an answer, by stop_token_ids")
        return Ticket(served, prompt, ids, sampling, most, time.monotonic() + limits.seconds, on_piece)

    # the engine's thread

    def _work(self) -> None:
        while self._admit():
            try:
                self._step()
            except Exception as error:  # not of the model, which _step sees to: nobody may wait for ever
                for ticket in self._running:
                    ticket.fail(f"the engine failed: {type(error).__name__}: {error}")
                self._leave_out()

    def _admit(self) -> bool:
        """Wait for work; give free places to those that wait longest. False when there is none and will be none."""
        with self._changed:
            while not (self._waiting or self._running):
                if self._closing:
                    return False
                self._changed.wait()
            while self._waiting and len(self._running) < self._limits.max_batch:
                self._running.append(self._waiting.popleft())
            expired = [ticket for ticket in self._waiting if ticket.over(self._limits.seconds)]
            for ticket in expired:
                self._waiting.remove(ticket)
        for ticket in expired:
            ticket.close()
        return True

    def _step(self) -> None:
        for ticket in self._running:
            if not ticket.over(self._limits.seconds) and ticket.sequence is None:
                self._guarded(ticket, self._begin, ticket)
        self._leave_out()
        going = self._shares()
        if not going:
            return
        try:
            scores = self._read(going)
        except Exception:
            # Whose fault it was shows when each goes on alone, from its tokens so far.
            for ticket in self._running:
                self._forget(ticket)
            for ticket in list(self._running):
                self._guarded(ticket, self._alone, ticket)
        else:
            scored = [ticket for ticket, count in going if ticket.num_read == len(ticket.tokens)]
            for ticket, row in zip(scored, scores, strict=True):
                self._guarded(ticket, ticket.go_on, row)
        self._leave_out()

    def _begin(self, ticket: Ticket) -> None:
        ticket.sequence = self._served.decoder.start(len(ticket.prompt_ids) + ticket.max_tokens, ticket.adapter)
        ticket.num_read = 0

    def _shares(self) -> list[tuple[Ticket, int]]:
        """How many tokens of each are read in this step: the newest of those that answer, and what there is room for
        of the prompts of others, in the order in which they came."""
        chunk = self._served.decoder.chunk
        left, shares = chunk, []
        for ticket in self._running:
            unread = len(ticket.tokens) - ticket.num_read
            if unread > 1 and left is not None:
                unread = min(unread, left)
                left -= unread
            if unread:
                shares.append((ticket, unread))
        return shares

    def _read(self, shares: list[tuple[Ticket, int]]) -> np.ndarray:
        feeds = []
        for ticket, count in shares:
            end = ticket.num_read + count
            feeds.append(Feed(ticket.sequence, ticket.tokens[ticket.num_read : end], end == len(ticket.tokens)))
        scores = self._served.decoder.feed(feeds)
        for ticket, count in shares:
            ticket.num_read += count
        return scores

    def _alone(self, ticket: Ticket) -> None:
        self._begin(ticket)
        while ticket.num_read < len(ticket.tokens):
            unread = len(ticket.tokens) - ticket.num_read
            scores = self._read([(ticket, min(unread, self._served.decoder.chunk or unread))])
        ticket.go_on(scores[0])

    def _guarded(self, ticket: Ticket, do: Callable[..., None], *arguments: Any) -> None:
        """An exception ends this request, with an error piece, and no other."""
        try:
            do(*arguments)
        except Exception as error:
            ticket.fail(f"{type(error).__name__}: {error}")

    def _forget(self, ticket: Ticket) -> None:
        sequence, ticket.sequence = ticket.sequence, None
        if sequence is None:
            return
        try:
            self._served.decoder.drop(sequence)
        except Exception as error:  # memory, perhaps; the decoder goes on without it in its next step
            logger.info(f"a finished request could not be dropped: {type(error).__name__}: {error}")

    def _leave_out(self) -> None:
        done = [ticket for ticket in self._running if ticket.over(self._limits.seconds)]
        if not done:
            return
        for ticket in done:
            self._forget(ticket)
        with self._changed:
            self._running = [ticket for ticket in self._running if ticket not in done]
        for ticket in done:
            ticket.close()
