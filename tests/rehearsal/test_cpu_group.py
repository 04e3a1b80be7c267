"""CPU process groups: every operation against NumPy on four ranks, and what happens when a rank fails, dies or hangs."""

from __future__ import annotations

import signal

import pytest
from cpu_ranks import RANKS, SHORT_S, driver, read_errors


@pytest.fixture(scope="module")
def run():
    with driver() as started:
        yield started


def test_operations_equal_numpy(run):
    result = run("operations")
    assert result["codes"] == [0] * RANKS, result["stderr"]
    assert result["stdout"][0].splitlines()[-1] == "all operations are right"


def test_fleet_starts_on_the_cpu_group(run):
    result = run("fleet")
    assert result["codes"] == [0] * RANKS, result["stderr"]


@pytest.mark.parametrize("what", ["waiting", "computing"])
def test_a_killed_rank_stops_all_ranks(run, what):
    result = run(f"killed_while_{what}")
    assert result["codes"] == [1, 1, -signal.SIGKILL, 1]
    found = read_errors(result)
    assert len(found) == 1 and "rank 2 (pid" in found[0] and "died without an error message" in found[0], found
    assert "died without an error message" in result["stderr"][0]  # the lowest rank's, which the launcher shows


def test_an_exception_is_shown_once(run):
    result = run("raises")
    assert result["codes"] == [1] * RANKS
    found = read_errors(result)
    assert found == ["Traceback (most recent call last):", "ValueError: the data is broken"]
    assert "Traceback" in result["stderr"][1]


def test_an_announced_failure_is_shown_once(run):
    result = run("announces")
    assert result["codes"] == [1] * RANKS
    assert read_errors(result) == ["oarlock: error (rank 3): no such corpus"]


def test_a_failure_in_a_backward_pass_stops_all_ranks(run):
    result = run("fails_in_backward")
    assert result["codes"] == [1] * RANKS
    found = read_errors(result)
    assert len(found) == 1 and "rank 1 all_reduce (sum) of float32, 16 bytes" in found[0], result["stderr"]


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("late", [f"waited {SHORT_S} s in all_reduce of float32 [3, 5] in the group of ranks [0, 1, 2, 3]", "rank 3 did not arrive"]),
        ("late_in_a_sub_group", [f"waited {SHORT_S} s in broadcast of int64 [7] in the group of ranks [1, 3]", "rank 3 did not arrive"]),
        ("late_sender", [f"waited {SHORT_S} s in recv of float32 [2] from rank 1 in the group of ranks [0, 1, 2, 3]"]),
        ("nobody_receives", [f"waited {SHORT_S} s in send of int64 [1] in the group of ranks [0, 1, 2, 3]; rank 1 did not arrive"]),
        ("different_operations", ["rank 0 all_reduce (sum) of float32, 4,194,304 bytes", "broadcast of float32, 64 bytes with rank 1 of the group as root"]),
        ("different_sizes", ["all_gather of int64, 80 bytes", "all_gather of int64, 88 bytes"]),
        ("different_splits", ["rank 0 sends 24 bytes to rank 1, which expects 16"]),
        ("different_messages", ["rank 1 expects 32 bytes of float32", "rank 0 has sent 48 bytes of float32"]),
        ("ends_early", ["rank 1 has ended its program while rank"]),
        ("several_machines", ["CPU groups work on one host: rank 0 runs on", "and rank 3 runs on"]),
    ],
)  # fmt: skip
def test_error_texts(run, scenario, words):
    result = run(scenario)
    assert sum(map(bool, result["codes"])) >= 3, result
    shown = [line for line in read_errors(result) if line.startswith("oarlock: error")]
    assert len(shown) == len(read_errors(result)) == (2 if scenario == "several_machines" else 1), result["stderr"]
    assert all(word in shown[0] for word in words), shown
