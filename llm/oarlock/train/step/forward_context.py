"""How a batch goes through the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paddle

Batch = dict[str, paddle.Tensor]


@dataclass(frozen=True)
class ForwardContext:
    """What surrounds a forward pass.

    Attributes:
        prepare: makes the model's inputs from a batch (masks of packed rows).
        autocast: context of mixed precision.
    """

    prepare: Callable[[Batch], Batch]
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
