"""Types that stand for Paddle's, whose own have no annotations."""

from typing import Any

Tensor = Any  # a paddle.Tensor
