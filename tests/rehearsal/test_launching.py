"""The launch scripts with Paddle's real launcher: a killed rank is restarted, and two launchers act as two nodes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import PortWatch

from helpers import ROOT, read_rows

FLAGS = {
    "max_steps": 14, "max_seq_length": 32, "logging_steps": 1, "save_steps": 4, "learning_rate": 1e-3, "eval_steps": 100,
    "warmup_ratio": 0, "recompute": 0, "report_to": "none", "dataloader_num_workers": 0, "split": "90,10,0",
    "per_device_train_batch_size": 2,
}  # fmt: skip


def start(
    tmp_path: Path, name: str, model: Path, data: Path, flags: dict, **variables: object
) -> subprocess.Popen[str]:
    """Start run_trainer.sh on CPU ranks."""
    environment = os.environ | {
        "DEVICE": "cpu", "MODEL": str(model), "TOKENIZER": str(model), "DATA": str(data), "PYTHON": sys.executable,
        "OUTPUT": str(tmp_path / name), "LOG_DIR": str(tmp_path / f"{name}-log"),
    }  # fmt: skip
    words = [word for flag, value in (FLAGS | flags).items() for word in (f"--{flag}", str(value))]
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts/run_trainer.sh"), *words], cwd=tmp_path, text=True, start_new_session=True,
        env=environment | {k: str(v) for k, v in variables.items()}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(*processes: subprocess.Popen[str]) -> None:
    """Wait until launches succeed; none of their processes may listen on a port."""
    try:
        with contextlib.ExitStack() as stack:
            watches = [stack.enter_context(PortWatch(process.pid)) for process in processes]
            for process in processes:
                output, _ = process.communicate(timeout=240)
                assert process.returncode == 0, output[-4000:]
        for watch in watches:
            assert watch.processes and not watch.found
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def read_losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row}


def find_ranks(folder: Path) -> list[int]:
    """Process ids of the trainers that write into a folder, in rank order."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
            variables = (path / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        number = next((v.partition("=")[2] for v in variables if v.startswith("PADDLE_TRAINER_ID=")), None)
        if number is not None and str(folder) in words and any("run_pretrain.py" in word for word in words):
            found[int(number)] = int(path.name)
    return [found[number] for number in sorted(found)]


def test_a_restarted_rank_continues_with_the_same_losses(tmp_path, tiny_model, corpus):
    flags = {"sharding": "stage1", "tensor_parallel_degree": 1}
    finish(start(tmp_path, "whole", tiny_model, corpus, flags, GPUS=2))
    process = start(tmp_path, "killed", tiny_model, corpus, flags, GPUS=2, MAX_RESTART=2)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("checkpoint-*/manifest.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(find_ranks(tmp_path / "killed")[-1], signal.SIGKILL)
    finish(process)
    expected = read_losses(tmp_path / "whole")
    assert len(expected) == 14 and read_losses(tmp_path / "killed") == expected


@pytest.mark.parametrize("flags", [{"sharding": "", "tensor_parallel_degree": 2}], ids=["tensor"])
def test_two_launchers_act_as_two_nodes(tmp_path, tiny_model, corpus, flags):
    flags = flags | {"max_steps": 5}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{probe.getsockname()[1]}"
    nodes = [
        start(tmp_path, "nodes", tiny_model, corpus, flags, GPUS=1, NNODES=2, MASTER=master, NODE_RANK=i)
        for i in (0, 1)
    ]
    finish(*nodes)
    one = {"sharding": "", "max_steps": 5, "tensor_parallel_degree": 1}
    finish(start(tmp_path, "one", tiny_model, corpus, one, GPUS=1))
    found, expected = read_losses(tmp_path / "nodes"), read_losses(tmp_path / "one")
    assert len(expected) == 5
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-5)
