"""What oarlock changes in Paddle so that Fleet runs on CPUs: each patch is needed, and with it the results are right.

The work is done by patched_layers.py, in processes of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from patched_layers import CHECKS, NEEDED_BY, RANKS, WORKS

TESTS = Path(__file__).resolve().parents[1]
LLM = TESTS.parent / "llm"
# How Paddle 3.3.1 fails on a CPU without a patch. The operators look for a C++ process group before they say that they
# have no CPU kernel, and do not find one: a crash.
CRASH = "SIGSEGV|Do not support c_[a-z_]+ for cpu kernel now"
FAILURES = {
    "hybrid_parallel_util.broadcast_input_data": "Only support xpu, gpu and custom_device now, but this is cpu",
    "ParallelEnv._device_id": "has no attribute '_device_id'",
    "_C_ops.c_identity": "Do not support c_identity for cpu kernel now",
    "_legacy_C_ops.c_identity": "Do not support c_identity for cpu kernel now",
    "cuda.synchronize": "Paddle is not compiled with CUDA",
    "device.synchronize": "TypeError: device should be gpu, xpu",
    "mp_ops._c_concat": CRASH,
    "mp_ops._c_split": CRASH,
    "mp_ops._c_softmax_with_cross_entropy": CRASH,
    "core.is_compiled_with_cuda": "Only support CUDA / XPU / CustomDevice",
    "paddle.get_device": "IndexError",
    "ParamStorage.add_rank_params": "Tensor not initialized yet",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches")
    path = os.pathsep.join(map(str, (LLM, TESTS, TESTS / "rehearsal")))
    run = subprocess.run(
        [sys.executable, TESTS / "rehearsal" / "patched_layers.py", folder],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def outcomes(folder):
    return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_results_are_right(folder, check):
    problems = [json.loads((folder / f"checks-{rank}.json").read_text())[check] for rank in range(RANKS)]
    assert not any(problems), "\n".join(f"rank {rank}: {problem}" for rank, problem in enumerate(problems))


@pytest.mark.parametrize("patch", FAILURES)
def test_patch_is_needed(outcomes, patch):
    for outcome in outcomes[patch]:
        assert outcome != WORKS, f"Paddle no longer needs this patch: remove it ({patch} in fleet_patches.py)"
        assert re.search(FAILURES[patch], outcome), outcome


def test_all_patches_are_tried(outcomes):
    assert set(outcomes["owners"]) == set(FAILURES) == set(NEEDED_BY)


@pytest.mark.parametrize("patch", [name for name in FAILURES if re.search("[.]_c_|broadcast", name)])
def test_patch_reaches_all_who_imported_the_name(outcomes, patch):
    owners, holders = outcomes["owners"][patch]
    assert set(owners) == set(holders)


def test_on_a_gpu_nothing_is_changed(outcomes):
    assert outcomes["imported"] == [], "importing oarlock.train.setup must not import what is for CPUs"
    assert outcomes["lends"] == {"cpu, 1": False, "cpu, 2": True, "gpu, 1": False, "gpu, 2": False}
