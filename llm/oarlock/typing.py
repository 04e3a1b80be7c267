"""Types for the objects of Paddle, which has no annotations."""

from typing import Any

Tensor = Any  # a paddle.Tensor
