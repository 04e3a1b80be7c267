"""Two data-parallel processes through Paddle's own launcher equal one: losses, evaluation, checkpoint, final weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers import LLM, flags, rows


def run(words, processes: int, folder) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(processes), "--log_dir", str(folder / "log")]
    command = [sys.executable, *(launcher if processes > 1 else []), str(LLM / "finetune_generation.py"), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=folder
    )
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, "")


@pytest.mark.parametrize("lengths", ["uneven"])
def test_two_processes_equal_one(tmp_path, tiny_model, lengths):
    found = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        words = flags(
            model_name_or_path=tiny_model, output_dir=folder / "out", max_steps=6, src_length=32, tgt_length=16,
            per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2, per_device_eval_batch_size=5,
            learning_rate=1e-3, logging_steps=1, save_steps=3, do_train=1, do_eval=1, report_to="none", device="cpu",
        )  # fmt: skip
        result = run(words, processes, folder)
        assert result.returncode == 0, result.stdout[-3000:]
        found[processes] = rows(folder / "out" / "metrics.jsonl"), load_file(folder / "out" / "model.safetensors")
        assert (folder / "out" / "checkpoint-3" / "manifest.json").exists()
    one, two = found[1], found[2]
    assert len(one[0]) == len(two[0]) == 7
    for a, b in zip(one[0], two[0], strict=True):
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-5), (name, a["step"])
        assert a.get("samples") == b.get("samples") and a.get("eval_tokens") == b.get("eval_tokens")
    for name, weight in one[1].items():
        assert np.abs(weight - two[1][name]).max() < 1e-5, name
