"""The error of a request that Triton does not answer."""

from __future__ import annotations

import grpc

AWAY = "the model is being started; try again soon"


class TritonFailure(Exception):
    """Triton refused a request, could not answer it, or is away.

    Attributes:
        code: of gRPC.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def is_of_a_dead_process(text: str) -> bool:
    """Whether Triton says that a model's process has ended; it is started again (see process_tree.py)."""
    return "stub process" in text.lower()
