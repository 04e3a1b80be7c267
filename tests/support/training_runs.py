"""Flags of small runs, and a helper that waits for their metrics."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from helpers import ROOT, make_flags

sys.path.insert(0, str(ROOT / "tests"))


def pretrain_flags(model: Path, corpus: Path, output: Path, **changes) -> list[str]:
    options = {
        "model_name_or_path": model, "input_dir": corpus, "output_dir": output, "max_seq_length": 32, "split": "90,10,0",
        "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1, "save_steps": 3, "learning_rate": 1e-3,
        "do_train": 1, "report_to": "none",
    }  # fmt: skip
    return make_flags(**(options | changes))


def wait_for_rows(path: Path, count: int, process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.005)
    raise AssertionError(
        f"{path} did not reach {count} rows: {process.communicate()[1] if process.poll() is not None else 'time'}"
    )
