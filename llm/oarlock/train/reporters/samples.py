"""samples.jsonl: the model's answers at each evaluation."""

from __future__ import annotations

from pathlib import Path

from oarlock.environment.ranks import is_first_rank
from oarlock.train.reporters.row_file import append_rows, cut_rows_after
from oarlock.train.reporters.visualdl import VisualDLReporter


class SampleLog:
    """Writes the model's answers at evaluations to samples.jsonl and VisualDL."""

    def __init__(self, path: Path, reporter: VisualDLReporter | None, cut_after: int | None) -> None:
        self.path, self.reporter = path, reporter
        if is_first_rank() and cut_after is not None:
            cut_rows_after(path, cut_after)

    def add(self, step: int, epoch: float, samples: list[dict[str, str]]) -> None:
        """Append the rows of an evaluation (see Answer.row)."""
        if not is_first_rank():
            return
        append_rows(self.path, [{"step": step, "epoch": round(epoch, 6)} | sample for sample in samples])
        if self.reporter is not None:
            self.reporter.add_samples(step, samples)
