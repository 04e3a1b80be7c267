"""What Triton says when it does not answer."""

from __future__ import annotations

import grpc


class TritonFailure(Exception):
    """Triton refused a request, could not answer it, or is away.

    Attributes:
        code: of gRPC.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
