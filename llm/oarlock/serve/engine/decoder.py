"""What the engine needs of a model: keys and values of sequences that come and go, and scores of the next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Feed:
    """Tokens that a sequence goes on with.

    Attributes:
        sequence: from Decoder.start().
        tokens: at least one.
        scored: whether the scores after the last one are wanted.
    """

    sequence: Any
    tokens: Sequence[int]
    scored: bool = True


class Decoder(Protocol):
    """A model that reads sequences of its own lengths together.

    Attributes:
        chunk: tokens that it takes in a call of feed(), apart from one for each sequence; None for any number, where a
            prompt has to come whole.
        vocabulary: number of scores.
    """

    chunk: int | None
    vocabulary: int

    def start(self, capacity: int, adapter: str | None) -> Any:
        """An empty sequence of at most `capacity` tokens."""
        ...

    def feed(self, feeds: Sequence[Feed]) -> np.ndarray:
        """Read the tokens; float32 [scored feeds, vocabulary] in their order.

        A sequence is fed once in a call. After an exception the sequences of the call have to be dropped.
        """
        ...

    def drop(self, sequence: Any) -> None:
        """Forget a sequence, at any time."""
        ...
