"""Runs that are killed or stopped, and then resumed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers import LLM, ROOT, read_rows, run_program
from oarlock.environment import matmul_library
from oarlock.train.checkpoint.manifest import read_manifest
from oarlock.train.output.lock import LOCK_FILE

sys.path.insert(0, str(ROOT / "tests"))
import kill_and_resume
from support.training_runs import pretrain_flags, wait_for_rows

# resume


def test_a_run_killed_at_random_moments_resumes_bit_for_bit(monkeypatch, capsys):
    """The short form of tests/kill_and_resume.py; 20 kills are run by hand."""
    monkeypatch.setattr(sys, "argv", ["kill_and_resume.py", "--kills", "3", "--steps", "200", "--seed", "5"])
    code = kill_and_resume.main()
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["same_losses"] and summary["same_weights"] and not summary["leftovers"], summary
    assert summary["kills"] == 3 and code == 0


def test_sigterm_saves_and_the_same_command_resumes(tmp_path, tiny_config, corpus):
    words = pretrain_flags(tiny_config, corpus, tmp_path / "cut", max_steps=200, save_steps=1000)
    process = subprocess.Popen(
        [sys.executable, str(LLM / "run_pretrain.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_rows(tmp_path / "cut" / "metrics.jsonl", 1, process)
    process.send_signal(signal.SIGSTOP)  # it can't end before the second one is reported
    second = run_program("run_pretrain.py", *words, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert second.returncode == 1 and not second.stdout
    assert f"process {process.pid} on" in second.stderr and "is running in this folder. Nothing was" in second.stderr
    imported = {line.rpartition("|")[2].strip() for line in second.stderr.splitlines()}
    assert "oarlock.train.output.lock" in imported and not imported & {"paddle", "paddlenlp", "transformers"}
    process.send_signal(signal.SIGCONT)
    process.terminate()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "SIGTERM: finishing this step" in output and "the same command resumes from there" in output
    assert not (tmp_path / "cut" / "model.safetensors").exists() and not (tmp_path / "cut" / LOCK_FILE).exists()
    assert run_program("run_pretrain.py", *words).returncode == 0
    alone = pretrain_flags(tiny_config, corpus, tmp_path / "alone", max_steps=200, save_steps=1000)
    assert run_program("run_pretrain.py", *alone).returncode == 0
    first, second = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("cut", "alone"))
    assert [(r["step"], r["loss"]) for r in first] == [(r["step"], r["loss"]) for r in second]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("cut", "alone")]
    assert all(np.array_equal(weights[0][key], weights[1][key]) for key in weights[1])


def test_a_changed_batch_size_resumes_at_the_right_sample(tmp_path, tiny_config, corpus):
    run_program("run_pretrain.py", *pretrain_flags(tiny_config, corpus, tmp_path, num_train_epochs=1, max_steps=4))
    words = pretrain_flags(
        tiny_config, corpus, tmp_path, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        resume_from_checkpoint=tmp_path / "checkpoint-4",
    )  # fmt: skip
    result = run_program("run_pretrain.py", *words)
    assert result.returncode == 0, result.stderr
    assert "step 4, 16 samples seen" in result.stdout
    assert [row["samples"] for row in read_rows(tmp_path / "metrics.jsonl")][-2:] == [22, 28]


def test_a_damaged_checkpoint_is_skipped(tmp_path, tiny_config, corpus):
    words = pretrain_flags(tiny_config, corpus, tmp_path)
    assert run_program("run_pretrain.py", *words).returncode == 0
    weights = tmp_path / "checkpoint-6" / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 255
    weights.write_bytes(content)
    expected = (tmp_path / "model.safetensors").read_bytes()
    result = run_program("run_pretrain.py", *words)
    assert result.returncode == 0, result.stderr
    assert (
        "checkpoint-6 is skipped" in result.stdout
        and "resuming from" in result.stdout
        and "checkpoint-3" in result.stdout
    )
    assert (tmp_path / "model.safetensors").read_bytes() == expected


@pytest.mark.skipif(not matmul_library.LIBRARY.exists(), reason=f"{matmul_library.LIBRARY.name} is not built")
def test_a_resumed_run_keeps_its_matmul_library(tmp_path, tiny_config, corpus):
    """Even on a machine with another processor."""
    other = next(library for library in matmul_library.TITLES if library != matmul_library.choose_library())
    words = pretrain_flags(tiny_config, corpus, tmp_path / "out")
    first = run_program("run_pretrain.py", *words, env={matmul_library.VARIABLE: other})
    assert f"matrix multiplication by {matmul_library.TITLES[other]}" in first.stdout, first.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["products"] == other
    whole = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    assert read_manifest(tmp_path / "out" / "checkpoint-3").products == other
    second = run_program("run_pretrain.py", *words, env={matmul_library.VARIABLE: ""})
    assert f"matrix multiplication by {matmul_library.TITLES[other]}, as in the checkpoint" in second.stdout, (
        second.stderr
    )
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def test_another_configuration_is_refused(tmp_path, tiny_config, corpus):
    assert run_program("run_pretrain.py", *pretrain_flags(tiny_config, corpus, tmp_path)).returncode == 0
    result = run_program("run_pretrain.py", *pretrain_flags(tiny_config, corpus, tmp_path, learning_rate=2e-3))
    assert result.returncode == 1 and "learning_rate was 0.001, is 0.002" in result.stderr
    assert "Traceback" not in result.stderr
