"""The context of a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paddle

Batch = dict[str, paddle.Tensor]


@dataclass(frozen=True)
class ForwardContext:
    """The steps around a forward pass of the model.

    Attributes:
        prepare: converts a batch to the model's inputs (adds the masks of packed rows).
        autocast: creates the context of mixed precision.
    """

    prepare: Callable[[Batch], Batch]
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
