"""Whole fine-tuning runs through Paddle's own launcher equal one process: losses, evaluation, answers, final model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from ports import PortWatch
from safetensors.numpy import load_file

from helpers import LLM, make_flags, read_rows


def run(words, processes: int, folder, module: str = "launch") -> subprocess.CompletedProcess[str]:
    launcher = [
        "-m",
        f"paddle.distributed.{module}",
        "--nproc_per_node",
        str(processes),
        "--log_dir",
        str(folder / "log"),
    ]
    command = [sys.executable, *(launcher if processes > 1 else []), str(LLM / "finetune_generation.py"), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=folder
    )
    try:
        with PortWatch(process.pid) as ports:
            output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert not ports.found and (processes == 1 or len(ports.processes) >= processes)
    return subprocess.CompletedProcess(command, process.returncode, output, "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model):
    """Plan name -> its folder; each runs on first use."""
    done: dict[str, Any] = {}

    def get(name: str, processes: int, micro: int, **options: Any) -> Any:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            words = make_flags(
                model_name_or_path=tiny_model, output_dir=folder / "out", max_steps=6, src_length=32, tgt_length=16,
                per_device_train_batch_size=micro, gradient_accumulation_steps=2, per_device_eval_batch_size=5,
                learning_rate=1e-3, adam_epsilon=1e-5, logging_steps=1, save_steps=3, do_train=1, do_eval=1,
                do_generation=1, max_evaluate_steps=3, report_to="none", device="cpu", **options,
            )  # fmt: skip
            result = run(words, processes, folder)
            assert result.returncode == 0, result.stdout[-3000:]
            done[name] = folder / "out"
        return done[name]

    return get


@pytest.mark.parametrize(
    ("name", "micro", "options"),
    [
        ("data", 2, {}),
        ("tensor", 4, {"tensor_parallel_degree": 2}),
        ("pipeline", 4, {"pipeline_parallel_degree": 2}),
        ("stage3", 2, {"sharding": "stage3", "stage3_min_elements": 256, "async_save": 1}),
    ],
)
def test_two_processes_equal_one_process(runs, name, micro, options):
    one, two = runs("one", 1, 4), runs(name, 2, micro, **options)
    alone, together = read_rows(one / "metrics.jsonl"), read_rows(two / "metrics.jsonl")
    assert len(alone) == len(together) == 7
    compared = 0
    for a, b in zip(alone, together, strict=True):
        for key in ("loss", "grad_norm", "eval_loss"):
            if key in a and (micro == 4 or key != "eval_loss"):  # max_evaluate_steps counts batches of each rank
                assert a[key] == pytest.approx(b[key], rel=1e-5), (key, a["step"])
                compared += 1
        assert a.get("samples") == b.get("samples")
    assert compared >= 12
    answers = [[row["answer"] for row in read_rows(folder / "samples.jsonl")] for folder in (one, two)]
    assert answers[0] == answers[1] and len(answers[0]) > 3  # through tensor and pipeline ranks too
    weights = [load_file(folder / "model.safetensors") for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for key, weight in weights[0].items():
        assert np.abs(weight - weights[1][key]).max() < 1e-5, key
    assert (two / "checkpoint-3" / "manifest.json").exists() and (two / "checkpoint-6" / "manifest.json").exists()
    assert not list(two.glob(".checkpoint*"))
