"""Metrics and samples in VisualDL."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from paddlenlp.trainer.integrations import VisualDLCallback, rewrite_logs

from oarlock.environment.ranks import is_first_rank
from oarlock.errors import EnvironmentProblem
from oarlock.train.reporters.row_file import Row, read_rows


class VisualDLReporter(VisualDLCallback):
    """PaddleNLP's VisualDL callback, with the options of the run as hyper-parameters.

    PaddleNLP passes TrainingArguments with booleans, which VisualDL stores as integers and protobuf 6 refuses.

    VisualDL shows only the newest file of a folder and can't append to a file. So after a resume the rows of
    metrics.jsonl and samples.jsonl are written to the new file first.
    """

    def __init__(self, logdir: Path, options: dict[str, Any], text: str, output_dir: Path) -> None:
        super().__init__()
        self._logdir, self._options, self._text, self._output_dir = logdir, options, text, output_dir

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
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
            for name, value in rewrite_logs(_select_scalars(row)).items():
                self.vdl_writer.add_scalar(name, value, row["step"], walltime=int(when * 1000))
        samples: dict[int, list[Row]] = {}
        for row in read_rows(self._output_dir / "samples.jsonl"):
            if {"prompt", "answer"} <= row.keys():
                samples.setdefault(row["step"], []).append(row)
        for step, rows in samples.items():
            self.add_samples(step, rows)

    def on_log(self, args: Any, state: Any, control: Any, logs: Row | None = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=_select_scalars(logs or {}), **kwargs)

    def add_samples(self, step: int, samples: list[Row]) -> None:
        """Write the answers of an evaluation as text; those of --eval_prompts ("source") get their own tab."""
        if self.vdl_writer is None:
            return
        tabs: dict[str, list[str]] = {}
        for sample in samples:
            tab = tabs.setdefault("eval_prompts" if "source" in sample else "samples", [])
            tab.append(f"{sample['prompt']}\n=> {sample['answer']}")
        for name, texts in tabs.items():
            self.vdl_writer.add_text(name, "```\n" + "\n\n".join(texts) + "\n```", step)
        self.vdl_writer.flush()


def _select_scalars(row: Row) -> dict[str, float]:
    """Select the finite numbers of a row that are worth a chart."""
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
