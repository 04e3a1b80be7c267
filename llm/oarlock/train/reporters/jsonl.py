"""metrics.jsonl: a row of metrics per log."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from paddlenlp.trainer import TrainerCallback

from oarlock.environment.ranks import is_first_rank
from oarlock.train.reporters.row_file import Row, append_rows, cut_rows_after


class MetricsFile(TrainerCallback):
    """Writes metrics.jsonl: a row per log, with step, epoch, loss, learning_rate, grad_norm, ... or eval_*.

    After a resume, rows later than the checkpoint are removed first, because they will be written again.
    """

    def __init__(self, path: Path, cut_after: int | None) -> None:
        self.path = path
        if is_first_rank() and cut_after is not None:
            cut_rows_after(path, cut_after)

    def on_log(self, args: Any, state: Any, control: Any, logs: Row | None = None, **_: Any) -> None:
        if is_first_rank() and logs:
            row = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6)} | logs | {"time": time.time()}
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            append_rows(self.path, [finite])
