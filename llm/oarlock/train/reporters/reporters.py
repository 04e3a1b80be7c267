"""Where the figures of a run go: console, metrics.jsonl, VisualDL."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

from paddlenlp.trainer import TrainerCallback
from paddlenlp.trainer.integrations import VisualDLCallback, rewrite_logs
from tqdm import tqdm

from oarlock.environment.console import get_logger, progress_bar
from oarlock.environment.ranks import is_first_rank
from oarlock.errors import EnvironmentProblem
from oarlock.train.checkpoint.row_file import Row, append_rows, cut_rows_after, read_rows

logger = get_logger(__name__)


class Console(TrainerCallback):
    """One progress bar on rank 0, with loss, learning rate, gradient norm, tokens/s and time left.

    Without a terminal, or with --disable_tqdm, a line per log row in its place.
    """

    def __init__(self, as_lines: bool) -> None:
        self.as_lines = as_lines or not sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._eval_bar: tqdm | None = None
        self._started, self._first_step = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the bar."""
        self._started, self._first_step = time.monotonic(), state.global_step
        if is_first_rank() and not self.as_lines:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="train", unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step further."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        """One evaluation batch further."""
        if self._eval_bar is None and not self.as_lines:
            self._eval_bar = progress_bar(len(eval_dataloader), "evaluate", "batch", leave=False)
        if self._eval_bar is not None:
            self._eval_bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Row | None = None, **_: Any) -> None:
        """Show a row."""
        if self._eval_bar is not None:
            self._eval_bar.close()
            self._eval_bar = None
        if not is_first_rank() or not logs:
            return
        if "loss" not in logs:
            figures = (f"{k} {short(v)}" for k, v in logs.items() if not k.endswith(("_per_second", "_tokens")))
            self._print(f"step {state.global_step}: {', '.join(figures)}")
        elif self._bar is not None:
            self._bar.set_postfix_str(_training_text(logs))
        else:
            self._print(f"step {state.global_step}/{state.max_steps}: {_training_text(logs)}{self._left(state)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            logger.info(text)

    def _left(self, state: Any) -> str:
        done = state.global_step - self._first_step
        if done <= 0 or state.global_step >= state.max_steps:
            return ""
        seconds = (time.monotonic() - self._started) / done * (state.max_steps - state.global_step)
        return f", {tqdm.format_interval(seconds)} left"


def _training_text(logs: Row) -> str:
    parts = [
        f"loss {logs['loss']:.4f}",
        f"lr {logs['learning_rate']:.3g}",
        f"grad norm {logs['grad_norm']:.3g}",
        f"{logs['tokens_per_second']:,.0f} tokens/s",
    ]
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.1%}")
    return ", ".join(parts)


def short(value: Any) -> str:
    """A figure in few characters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class MetricsFile(TrainerCallback):
    """metrics.jsonl: a row per log, keys step, epoch, loss, learning_rate, grad_norm, tokens_per_second, ... or eval_*.

    After a resume the rows behind the checkpoint's step are cut off first: they are about to be made again.
    """

    def __init__(self, path: Path, cut_after: int | None) -> None:
        self.path = path
        if is_first_rank() and cut_after is not None:
            cut_rows_after(path, cut_after)

    def on_log(self, args: Any, state: Any, control: Any, logs: Row | None = None, **_: Any) -> None:
        """Append a row."""
        if is_first_rank() and logs:
            row = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6)} | logs | {"time": time.time()}
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            append_rows(self.path, [finite])


class VisualDLReporter(VisualDLCallback):
    """PaddleNLP's VisualDL callback with hyper-parameters of the run's own configuration.

    (PaddleNLP's hands over TrainingArguments with booleans, which VisualDL stores as an int and protobuf 6 refuses.)

    VisualDL shows only the newest file of a folder and can't append to one, so after a resume the curve before it
    would be gone: what metrics.jsonl and samples.jsonl hold is written again first.
    """

    def __init__(self, logdir: Path, options: dict[str, Any], text: str, output_dir: Path) -> None:
        super().__init__()
        self._logdir, self._options, self._text, self._output_dir = logdir, options, text, output_dir

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the log and write what the run is."""
        if not is_first_rank():
            return
        try:
            self._init_summary_writer(args, str(self._logdir))
        except OSError as error:
            raise EnvironmentProblem(f"--logging_dir {self._logdir}: can't be written: {error.strerror}") from error
        self.vdl_writer.add_text("config", f"```\n{self._text}\n```", 0)
        simple = {k: v if type(v) in (int, float) else str(v) for k, v in self._options.items()}
        self.vdl_writer.add_hparams(simple, metrics_list=["train/loss", "eval/loss"])
        for row in read_rows(self._output_dir / "metrics.jsonl"):
            if not isinstance(when := row.get("time"), (int, float)):
                continue
            for name, value in rewrite_logs(_scalars(row)).items():
                self.vdl_writer.add_scalar(name, value, row["step"], walltime=int(when * 1000))
        samples: dict[int, list[Row]] = {}
        for row in read_rows(self._output_dir / "samples.jsonl"):
            if {"prompt", "answer"} <= row.keys():
                samples.setdefault(row["step"], []).append(row)
        for step, rows in samples.items():
            self.add_samples(step, rows)

    def on_log(self, args: Any, state: Any, control: Any, logs: Row | None = None, **kwargs: Any) -> None:
        """Scalars: train/* and eval/*."""
        super().on_log(args, state, control, logs=_scalars(logs or {}), **kwargs)

    def add_samples(self, step: int, samples: list[Row]) -> None:
        """The answers of one evaluation as text; those of --eval_prompts, which have a "source", by themselves."""
        if self.vdl_writer is None:
            return
        tabs: dict[str, list[str]] = {}
        for sample in samples:
            tab = tabs.setdefault("eval_prompts" if "source" in sample else "samples", [])
            tab.append(f"{sample['prompt']}\n=> {sample['answer']}")
        for name, texts in tabs.items():
            self.vdl_writer.add_text(name, "```\n" + "\n\n".join(texts) + "\n```", step)
        self.vdl_writer.flush()


def _scalars(row: Row) -> dict[str, float]:
    """The figures of a row that are worth a chart."""
    left_out = (
        "step",
        "epoch",
        "time",
        "eval_tokens",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
    )
    return {k: v for k, v in row.items() if k not in left_out and isinstance(v, (int, float)) and math.isfinite(v)}


class SampleLog:
    """samples.jsonl and VisualDL text: what the model says at each evaluation."""

    def __init__(self, path: Path, reporter: VisualDLReporter | None, cut_after: int | None) -> None:
        self.path, self.reporter = path, reporter
        if is_first_rank() and cut_after is not None:
            cut_rows_after(path, cut_after)

    def add(self, step: int, epoch: float, samples: list[dict[str, str]]) -> None:
        """Append rows of one evaluation (see Answer.row)."""
        if not is_first_rank():
            return
        append_rows(self.path, [{"step": step, "epoch": round(epoch, 6)} | sample for sample in samples])
        if self.reporter is not None:
            self.reporter.add_samples(step, samples)
