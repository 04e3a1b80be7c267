"""Type aliases for Paddle's classes, which have no annotations."""

from typing import Any

Tensor = Any  # a paddle.Tensor
