"""A request on its way through the engine: what it has read and said, and how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from oarlock.environment.console import get_logger
from oarlock.serve.engine.detokenize import Detokenizer, StopFinder
from oarlock.serve.engine.sampling import Sampler
from oarlock.serve.engine.sampling_params import FinishReason, Piece, Prompt, Sampling

if TYPE_CHECKING:
    from oarlock.serve.engine.loading import Served

logger = get_logger(__name__)


class Ticket:
    """What submit() gives. Callers use cancel() and wait(); the rest is the engine's.

    Attributes:
        tokens: of the prompt and of the answer so far.
        num_read: of them that the decoder has.
        sequence: the decoder's; None before it is begun.
    """

    def __init__(
        self,
        served: Served,
        prompt: Prompt,
        prompt_ids: list[int],
        sampling: Sampling,
        max_tokens: int,
        deadline: float,
        on_piece: Callable[[Piece], None],
    ) -> None:
        """Of a request that was checked.

        Args:
            deadline: of time.monotonic().
        """
        end_tokens, end_texts = served.end_of_turn() if prompt.messages is not None else ((), ())
        own_ends = () if sampling.ignore_eos else (*served.ends, *end_tokens)
        self._ends = frozenset((*own_ends, *sampling.stop_token_ids))
        self._sampler = Sampler(sampling, prompt_ids, self._ends)
        self._text = Detokenizer(served.decode)
        self._hidden = served.special_tokens
        self._stop = StopFinder((*sampling.stop, *(() if sampling.ignore_eos else end_texts)))
        self._min_tokens = sampling.min_tokens
        self._deadline, self._on_piece = deadline, on_piece
        self._num_pieces = 0
        self._cancelled, self._done = threading.Event(), threading.Event()
        self._finish: FinishReason | None = None
        self._error = ""
        self.prompt_ids, self.max_tokens, self.adapter = prompt_ids, max_tokens, prompt.adapter
        self.tokens = list(prompt_ids)
        self.num_read = 0
        self.sequence: Any = None

    def cancel(self) -> None:
        """Give up the place at the next step; the last piece says "cancelled". Afterwards it does nothing."""
        self._cancelled.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Until the last piece was given; whether it was, within `timeout` seconds."""
        return self._done.wait(timeout)

    # the engine's

    def over(self, seconds: float) -> bool:
        """Whether there is nothing more to do, in which case close() gives the last piece if it was not given."""
        if self._finish is None and self._cancelled.is_set():
            self._finish = "cancelled"
        if self._finish is None and time.monotonic() > self._deadline:
            self.fail(f"the request took longer than the {seconds:g} seconds that one may take")
        return self._finish is not None

    def fail(self, why: str) -> None:
        """End it with an error."""
        if self._finish is None:
            self._finish, self._error = "error", why

    def go_on(self, scores: np.ndarray) -> None:
        """Choose the next token by the scores [vocabulary], and give its piece."""
        token = self._sampler.choose(scores)
        if token in self._ends:
            self._finish = "stop"
            return
        self.tokens.append(token)
        answered = len(self.tokens) - len(self.prompt_ids)
        hidden = self._hidden.get(token, "")
        text = self._text.add(token, bool(hidden))
        if answered > self._min_tokens:  # what is said before that ends nothing
            text = self._stop.add(text) + self._stop.add(hidden, hidden=True)
        if self._stop.found:
            self._finish = "stop"
        elif answered >= self.max_tokens:
            self._finish = "length"
            text += self._rest()
        self._give(text, (token,))

    def close(self) -> None:
        """Give the last piece, if it was not given."""
        if not self._done.is_set():
            self._give(self._rest() if self._finish in ("stop", "length") else "", ())

    def _rest(self) -> str:
        text = self._stop.add(self._text.rest())
        return text + self._stop.rest()

    def _give(self, text: str, tokens: tuple[int, ...]) -> None:
        num_prompt = len(self.prompt_ids)
        piece = Piece(
            text, tokens, self._num_pieces, self._finish, num_prompt, len(self.tokens) - num_prompt, self._error
        )
        self._num_pieces += 1
        try:
            self._on_piece(piece)
        except Exception as error:  # the client is gone, or its code is wrong; the others go on
            logger.info(f"a client's on_piece failed, its request is cancelled: {type(error).__name__}: {error}")
            self.cancel()
        finally:
            if self._finish is not None:
                self._done.set()
