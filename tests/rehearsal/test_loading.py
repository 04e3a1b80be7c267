"""Weights and random initialization on four ranks (tensor 2 x pipeline 2, and smaller plans), from every file format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loading_before_ranks import BEFORE_CONNECTING
from loading_program import RANKS
from loading_scenarios import SCENARIOS

TESTS = Path(__file__).resolve().parents[1]
LLM = TESTS.parent / "llm"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    environment = {**os.environ, "PYTHONPATH": f"{LLM}:{TESTS}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("loading_program.py")), str(folder)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("scenario", [*BEFORE_CONNECTING, *SCENARIOS])
def test_every_loading_scenario_passes(results, scenario):
    for rank, result in enumerate(results):
        assert result.get(scenario, "not reached") == "", f"rank {rank}: {result.get(scenario)}"


def test_only_the_first_rank_of_a_node_reads_files(results):
    opened = [result["opened"] for result in results]
    assert opened[0] > 0 and opened[1:] == [0, opened[2], 0]
    assert opened[2] == 2, "only where ranks 2 and 3 were a node of their own"
