"""How many cores a run uses."""

from __future__ import annotations

import os

import pytest

from oarlock.environment.cpu import _cgroup_quota, choose_num_threads, count_available_cores

# threads


def test_share_of_the_cores(monkeypatch):
    for name in ("OMP_NUM_THREADS", "PADDLE_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert choose_num_threads() == count_available_cores() and choose_num_threads(3) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_num_threads() == 1
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", "2")
    assert choose_num_threads() == max(1, count_available_cores() // 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert choose_num_threads() == 5


@pytest.mark.parametrize(("text", "expected"), [("150000 100000", 1.5), ("max 100000", None)])
def test_container_quota(tmp_path, text, expected):
    (tmp_path / "cpu.max").write_text(text)
    assert _cgroup_quota(tmp_path) == expected


def test_training_uses_its_share_of_threads(tmp_path):
    """Plain paddle uses one thread; Oarlock gives the process its share."""
    import subprocess
    import sys

    from helpers import LLM

    code = "from oarlock.environment.paddle_import import import_paddle; print(import_paddle(2)); import os; print(os.environ['OMP_NUM_THREADS'])"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(LLM)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    assert result.stdout.split() == ["2", "2"] and "OMP_NUM_THREADS" not in result.stderr
