"""A request in the engine: what has been read and answered, and how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from oarlock.environment.console import get_logger
from oarlock.sampling.params import SamplingParams
from oarlock.serve.engine.detokenize import Detokenizer, StopFinder
from oarlock.serve.engine.sampler import Sampler
from oarlock.serve.request import FinishReason, Prompt, TokenChunk

if TYPE_CHECKING:
    from oarlock.serve.engine.loading import ServedModel

logger = get_logger(__name__)


class RunningRequest:
    """A request in the engine, from submit(). Callers use cancel() and wait(); the rest is for the engine.

    Attributes:
        tokens: prompt and answer so far.
        num_read: how many of them the decoder has read.
        sequence: the decoder's; None before it is started.
    """

    def __init__(
        self,
        model: ServedModel,
        prompt: Prompt,
        prompt_ids: list[int],
        sampling: SamplingParams,
        max_tokens: int,
        timeout: float,
        on_chunk: Callable[[TokenChunk], None],
    ) -> None:
        """Make the state of a request that has been checked.

        Args:
            timeout: seconds from now to the last token.
            on_chunk: is called with each chunk.
        """
        end_tokens, end_texts = model.end_of_turn() if prompt.messages is not None else ((), ())
        own_ends = () if sampling.ignore_eos else (*model.ends, *end_tokens)
        self._ends = frozenset((*own_ends, *sampling.stop_token_ids))
        self._sampler = Sampler(sampling, prompt_ids, self._ends)
        self._detokenizer = Detokenizer(model.decode)
        self._special_tokens = model.special_tokens
        self._stop = StopFinder((*sampling.stop, *(() if sampling.ignore_eos else end_texts)))
        self._min_tokens = sampling.min_tokens
        self._timeout, self._deadline, self._on_chunk = timeout, time.monotonic() + timeout, on_chunk
        self._cancelled, self._done = threading.Event(), threading.Event()
        self._finish: FinishReason | None = None
        self._error = ""
        self.prompt_ids, self.max_tokens, self.adapter = prompt_ids, max_tokens, prompt.adapter
        self.tokens = list(prompt_ids)
        self.num_read = 0
        self.sequence: Any = None

    def cancel(self) -> None:
        """Free the slot at the next step; the last chunk says "cancelled". Does nothing after the last chunk."""
        self._cancelled.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the last chunk. Returns whether it came within `timeout` seconds."""
        return self._done.wait(timeout)

    # for the engine

    def is_over(self) -> bool:
        """Whether there is nothing more to do. close() then sends the last chunk, if it was not sent."""
        if self._finish is None and self._cancelled.is_set():
            self._finish = "cancelled"
        if self._finish is None and time.monotonic() > self._deadline:
            self.fail(f"the request took longer than the {self._timeout:g} seconds that one may take")
        return self._finish is not None

    def fail(self, why: str) -> None:
        """End the request with an error."""
        if self._finish is None:
            self._finish, self._error = "error", why

    def append_token(self, logits: np.ndarray) -> None:
        """Choose the next token by its logits [vocabulary], and send its chunk."""
        token = self._sampler.choose(logits)
        if token in self._ends:
            self._finish = "stop"
            return
        self.tokens.append(token)
        answered = len(self.tokens) - len(self.prompt_ids)
        special = self._special_tokens.get(token, "")
        text = self._detokenizer.add(token, hidden=bool(special))
        if answered > self._min_tokens:  # stop texts before that end nothing
            text = self._stop.add(text) + self._stop.add(special, hidden=True)
        if self._stop.found:
            self._finish = "stop"
        elif answered >= self.max_tokens:
            self._finish = "length"
            text += self._flush()
        self._send(text, (token,))

    def close(self) -> None:
        """Send the last chunk, if it was not sent."""
        if not self._done.is_set():
            self._send(self._flush() if self._finish in ("stop", "length") else "", ())

    def _flush(self) -> str:
        text = self._stop.add(self._detokenizer.flush())
        return text + self._stop.flush()

    def _send(self, text: str, tokens: tuple[int, ...]) -> None:
        num_prompt = len(self.prompt_ids)
        chunk = TokenChunk(text, tokens, self._finish, num_prompt, len(self.tokens) - num_prompt, self._error)
        try:
            self._on_chunk(chunk)
        except Exception as error:  # the client has disconnected, or its code is wrong; others continue
            logger.info(f"a client's on_chunk failed, its request is cancelled: {type(error).__name__}: {error}")
            self.cancel()
        finally:
            if self._finish is not None:
                self._done.set()
