"""What the engine needs of a model: keys and values of sequences that come and go, and logits of the next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

# Name of a linear layer -> A [in, r] and scaling * B [r, out], float32.
LoraWeights = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Feed:
    """The next tokens of a sequence.

    Attributes:
        sequence: from Decoder.start().
        tokens: at least one.
        wants_logits: whether the logits after the last token are wanted.
    """

    sequence: Any
    tokens: Sequence[int]
    wants_logits: bool = True


class Decoder(Protocol):
    """A model that reads sequences of different lengths together.

    Attributes:
        chunk: most tokens in one call of feed(), not counting one per sequence; None for any number, where a prompt
            must be fed in one call.
        vocabulary: number of logits.
    """

    chunk: int | None
    vocabulary: int

    def start(self, capacity: int, adapter: str | None) -> Any:
        """An empty sequence of at most `capacity` tokens."""
        ...

    def feed(self, feeds: Sequence[Feed]) -> np.ndarray:
        """Read tokens. Returns logits, float32 [feeds that want logits, vocabulary], in their order.

        A sequence occurs once in a call. After an exception all sequences of the call must be dropped.
        """
        ...

    def drop(self, sequence: Any) -> None:
        """Forget a sequence. May be called at any time."""
        ...
