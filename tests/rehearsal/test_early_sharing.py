"""Without a CPU group, as on GPUs, ranks share values in memory on one machine and through Paddle's store between
machines.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "early_sharing.py"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    result = subprocess.run([sys.executable, str(PROGRAM), str(folder)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]

    def get(nodes: int, forged: bool) -> list:
        return [json.loads((folder / f"{nodes}-{forged}-{rank}.json").read_text()) for rank in range(4)]

    return get


def test_ranks_on_one_machine_need_no_store(shared):
    assert shared(1, False) == [[["/of/0", ["/of/0"]], [0] * (rank == 0), ""] for rank in range(4)]


def test_nodes_compare_their_data(shared):
    both = ["/of/0", "/of/2"]
    assert shared(2, False) == [[[f"/of/{rank // 2 * 2}", both], [rank] * (rank % 2 == 0), ""] for rank in range(4)]


def test_values_from_strangers_in_the_store_are_ignored(shared):
    for rank, (found, _, problem) in enumerate(shared(2, True)):
        own = f"/of/{rank // 2 * 2}"
        assert found == [own, [own, "/of/a stranger"] if rank < 2 else ["/of/a stranger", own]] and not problem
