"""Stops a run whose loss or gradient is not finite."""

from __future__ import annotations

import math
from typing import Any

from oarlock.errors import TrainingError
from oarlock.train.checkpoint.manifest import list_checkpoints


def check_finite(what: str, value: float, step: int, args: Any) -> None:
    """Refuse a NaN or infinite value, before a checkpoint is written. (fp16 skips such steps by itself.)

    Args:
        what: "loss" or "gradient".
        args: PaddleNLP's TrainingArguments.

    Raises:
        TrainingError: naming the newest checkpoint.
    """
    if math.isfinite(value) or args.fp16:
        return
    kept = next(iter(list_checkpoints(args.output_dir)), None)
    raise TrainingError(
        f"the {what} of step {step} is {value}. Earlier checkpoints are intact"
        + (f" (newest: {kept}). " if kept else " (none was written yet). ")
        + "Usual causes: --learning_rate too high, no warm-up, or a damaged sample; lower the rate and resume "
        "from a checkpoint with --resume_from_checkpoint."
    )
