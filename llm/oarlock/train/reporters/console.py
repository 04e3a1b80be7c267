"""The progress of a run on the console."""

from __future__ import annotations

import sys
import time
from typing import Any

from paddlenlp.trainer import TrainerCallback
from tqdm import tqdm

from oarlock.environment.console import get_logger, make_progress_bar
from oarlock.environment.ranks import is_first_rank
from oarlock.train.reporters.row_file import Row

logger = get_logger(__name__)


class Console(TrainerCallback):
    """A progress bar on rank 0 with loss, learning rate, gradient norm, tokens/s and remaining time.

    Without a terminal, or with --disable_tqdm, it prints a line per log row instead.
    """

    def __init__(self, as_lines: bool) -> None:
        self.as_lines = as_lines or not sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._eval_bar: tqdm | None = None
        self._started, self._first_step = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started, self._first_step = time.monotonic(), state.global_step
        if is_first_rank() and not self.as_lines:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="train", unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        if self._eval_bar is None and not self.as_lines:
            self._eval_bar = make_progress_bar(len(eval_dataloader), "evaluate", "batch", leave=False)
        if self._eval_bar is not None:
            self._eval_bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Row | None = None, **_: Any) -> None:
        if self._eval_bar is not None:
            self._eval_bar.close()
            self._eval_bar = None
        if not is_first_rank() or not logs:
            return
        if "loss" not in logs:
            shown = {k: v for k, v in logs.items() if not k.endswith(("_per_second", "_tokens"))}
            metrics = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
            self._print(f"step {state.global_step}: {', '.join(metrics)}")
        elif self._bar is not None:
            self._bar.set_postfix_str(_format_training_row(logs))
        else:
            done, left = state.global_step - self._first_step, ""
            if done > 0 and state.global_step < state.max_steps:
                seconds = (time.monotonic() - self._started) / done * (state.max_steps - state.global_step)
                left = f", {tqdm.format_interval(seconds)} left"
            self._print(f"step {state.global_step}/{state.max_steps}: {_format_training_row(logs)}{left}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            logger.info(text)


def _format_training_row(logs: Row) -> str:
    parts = [
        f"loss {logs['loss']:.4f}",
        f"lr {logs['learning_rate']:.3g}",
        f"grad norm {logs['grad_norm']:.3g}",
        f"{logs['tokens_per_second']:,.0f} tokens/s",
    ]
    if "expert_load_max" in logs:
        parts.append(f"busiest expert {logs['expert_load_max']:.1f}x")
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.1%}")
    return ", ".join(parts)
