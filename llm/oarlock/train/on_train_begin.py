"""A callback before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paddlenlp.trainer import TrainerCallback


class CallOnTrainBegin(TrainerCallback):
    """Calls a function before the first step, when the model is loaded and wrapped."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._action()


class EndedBeforeFirstStep(Exception):
    """The evaluation before training was interrupted, or it stopped the run early."""
