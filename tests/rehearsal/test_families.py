"""Every family under the plans it has, with every method it has, against one process: a few steps each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES as TINY
from oarlock.parallel.families import FAMILIES

BATCH, STEPS = 4, 3
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": 1, "r": 2},
    "prefix": {"prefix_tuning": 1, "num_prefix_tokens": 3},
    "p_tuning": {"p_tuning": 1, "num_virtual_tokens": 3, "p_tuning_encoder": "mlp"},
}
WAYS = {"tensor": {"tensor_parallel_degree": 2}, "pipeline": {"pipeline_parallel_degree": 2}, "data": {}}


def ways(name: str, method: str) -> list[str]:
    """The plans of two ranks that a family has for a method."""
    family = FAMILIES[name]
    if method == "prefix" and not family.past:
        return []
    found = ["tensor"] if family.tensor else ["data"]
    return [*found, "pipeline"] if family.pipeline and method in ("full", "lora") else found


def group(name: str, method: str) -> dict[str, Any]:
    flags = METHODS[method]
    plans = []
    for way in ways(name, method):
        batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1 if way == "data" else 2}
        plans.append({"ranks": 2, "flags": batch | WAYS[way] | flags})
    model = TINY[name] | {"model_type": name, "architectures": [FAMILIES[name].model]}
    common = {"kind": "finetune", "batch": BATCH, "steps": STEPS, "whole": True}
    return common | {"model": model, "flags": flags, "plans": plans}


GROUPS = [(name, method) for name in TINY for method in METHODS if ways(name, method)]
CASES = [
    pytest.param(number, position, id=f"{name}-{method}-{way}")
    for number, (name, method) in enumerate(GROUPS)
    for position, way in enumerate(ways(name, method))
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[int, int], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("families")
    (folder / "spec.json").write_text(json.dumps([group(*each) for each in GROUPS]))
    command = [sys.executable, str(Path(__file__).with_name("runs.py")), str(folder / "spec.json"), str(folder / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {tuple(result["case"][:2]): result for result in json.loads((folder / "out").read_text())}


@pytest.mark.parametrize(("number", "position"), CASES)
def test_a_family_under_a_plan_equals_one_process(results, number, position):
    result = results[number, position]
    assert result["problem"] is None, "\n".join([str(result["problem"]), *result.get("logs", [])])
    assert result["num_losses"] == STEPS
