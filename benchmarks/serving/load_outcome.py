"""A server under load, and its answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Target:
    """A running server.

    Attributes:
        process: id of its first process.
        max_body: longest body that it accepts, in bytes.
    """

    process: int
    openai: int
    rest: int
    grpc: int
    key: str = ""
    adapter: str = ""
    max_body: int = 1 << 20

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}


@dataclass
class Outcome:
    """The result of a load test.

    Attributes:
        answers: (kind of request, answer) -> count.
        unexpected: the first wrong answer to each kind of request.
        samples: requests done -> process -> resident MB.
    """

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    unexpected: dict[str, str] = field(default_factory=dict)
    num_unexpected: int = 0
    samples: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    begin: dict[str, tuple[int, int]] = field(default_factory=dict)
    end: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: float = 0.0
