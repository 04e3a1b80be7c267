"""Every family under its supported plans, with every supported method, equals one process for a few steps."""

from __future__ import annotations

from typing import Any

import pytest
from plan_runs import run_groups

from families import FAMILIES as TINY
from oarlock.families.registry import FAMILIES

BATCH, STEPS = 4, 3
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": 1, "r": 2},
    "prefix": {"prefix_tuning": 1, "num_prefix_tokens": 3},
    "p_tuning": {"p_tuning": 1, "num_virtual_tokens": 3, "p_tuning_encoder": "mlp"},
}
WAYS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_degree": 2},
    "sequence": {"tensor_parallel_degree": 2, "sequence_parallel": 1},
    "pipeline": {"pipeline_parallel_degree": 2},
    "data": {},
    "slices": {"sharding": "stage3"},
}


def list_plans(name: str, method: str) -> list[str]:
    """The plans of two ranks that a family supports with a method."""
    family = FAMILIES[name]
    if method == "prefix" and not family.kv_axes:
        return []
    found = ["tensor"] if family.tensor_parallel else ["data"]
    if name == "opt" and method in ("full", "lora"):  # tied, and Fleet reads an attribute that it lacks
        found.append("slices")
    if family.sequence_parallel and method in ("full", "lora"):
        found.append("sequence")
    return [*found, "pipeline"] if family.pipeline and method in ("full", "lora") else found


def group(name: str, method: str) -> dict[str, Any]:
    flags = METHODS[method]
    plans = []
    for way in list_plans(name, method):
        batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1 if way in ("data", "slices") else 2}
        plans.append({"ranks": 2, "flags": batch | WAYS[way] | flags})
    model = TINY[name] | {"model_type": name, "architectures": [FAMILIES[name].architecture]}
    common = {"kind": "finetune", "batch": BATCH, "steps": STEPS, "whole": True}
    return common | {"model": model, "flags": flags, "plans": plans}


GROUPS = [(name, method) for name in TINY for method in METHODS if list_plans(name, method)]
CASES = [
    pytest.param(number, position, id=f"{name}-{method}-{way}")
    for number, (name, method) in enumerate(GROUPS)
    for position, way in enumerate(list_plans(name, method))
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[int, int], dict[str, Any]]:
    found = run_groups([group(*each) for each in GROUPS], tmp_path_factory.mktemp("families"), seconds=850)
    return {(number, position): result for (number, position, _), result in found.items()}


@pytest.mark.parametrize(("number", "position"), CASES)
def test_a_family_under_a_plan_equals_one_process(results, number, position, record_property):
    result = results[number, position]
    record_property("plans", result.get("difference"))
    assert result["problem"] is None, "\n".join([str(result["problem"]), *result.get("logs", [])])
    assert result["num_losses"] == STEPS
