"""LoRA, QLoRA, prefix tuning and p-tuning under the plans equal one process; adapters change plans.

Losses and gradient norms of every step to 1e-5 relative, and every trained weight after every step (see runs.py).
"""

from __future__ import annotations

from typing import Any

import pytest
from plan_runs import run_groups
from test_plans import BATCH, MODELS, PP, TP, plan, wait_until

LORA = {"lora": 1, "r": 4, "lora_plus_scale": 4}
QLORA = {"qlora": 1, "r": 4, "rslora": 1}
PREFIX = {"prefix_tuning": 1, "num_prefix_tokens": 4}
P_TUNING = {"p_tuning": 1, "num_virtual_tokens": 4}

SPLIT = [
    plan(2, 2),
    plan(2, **{TP: 2, "sequence_parallel": 1}),
    plan(4, 2, sharding="stage1", **{TP: 2}),
    plan(4, 2, sharding="stage2", **{TP: 2}),
    plan(4, 2, sharding="stage3", **{TP: 2}),
]
STAGED = [
    plan(4, **{TP: 2, PP: 2, "recompute": 1}),
    plan(4, 2, micro=1, sharding="stage2", **{PP: 2}),
]
# Each adapter continues under another plan where the previous one stopped.
CHAIN = [wait_until(3, plan(4, **{TP: 2, PP: 2})), wait_until(6, plan(2, 2, sharding="stage3")), plan(1)]
STEPS = 4

GROUPS: list[dict[str, Any]] = [
    {"name": "lora", "model": "llama-grouped", "flags": LORA, "plans": [*SPLIT, *STAGED]},
    {"name": "lora-tied", "model": "qwen2-tied", "flags": LORA, "plans": [STAGED[0]]},
    {"name": "lora-chain", "model": "llama-grouped", "flags": LORA, "plans": [CHAIN], "steps": 8},
    {"name": "qlora", "model": "llama-grouped", "flags": QLORA, "plans": [SPLIT[1], SPLIT[3], *STAGED]},
    {"name": "prefix", "model": "llama-grouped", "flags": PREFIX, "plans": [*SPLIT, plan(2, 2, recompute=1)]},
    {"name": "p-tuning", "model": "llama-grouped", "flags": P_TUNING, "plans": SPLIT},
]


def with_flags(chosen: Any, flags: dict[str, Any]) -> Any:
    if isinstance(chosen, list):
        return [with_flags(link, flags) for link in chosen]
    return chosen | {"flags": chosen["flags"] | flags}


def groups() -> list[dict[str, Any]]:
    common = {"kind": "finetune", "batch": BATCH, "steps": STEPS}
    return [
        common
        | group
        | {"model": MODELS[group["model"]], "plans": [with_flags(each, group["flags"]) for each in group["plans"]]}
        for group in GROUPS
    ]


def cases() -> list[Any]:
    return [
        pytest.param(number, position, link, id=f"{group['name']}-{position}.{link}")
        for number, group in enumerate(groups())
        for position, chain in enumerate(group["plans"])
        for link in range(len(chain) if isinstance(chain, list) else 1)
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[int, int, int], dict[str, Any]]:
    return run_groups(groups(), tmp_path_factory.mktemp("methods"), seconds=600)


@pytest.mark.parametrize(("group", "position", "link"), cases())
def test_a_method_under_a_plan_equals_one_process(results, group, position, link):
    result = results[group, position, link]
    assert result["problem"] is None, "\n".join([str(result["problem"]), *result.get("logs", [])])
    last = result["plan"].get("stop_after", groups()[group].get("steps", STEPS))
    assert result["num_losses"] == last - result["steps_before"]


def test_only_trained_parameters_have_gradients_and_optimizer_state(results):
    """LoRA of rank 4 on two layers of width 32: the frozen model has no gradients and no optimizer state."""
    matrices = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))  # q, o; k, v (grouped); gate, up, down
    data_parallel = results[0, 0, 0]
    for rank in range(2):
        assert data_parallel["parameter_bytes"][rank] == 4 * matrices
        assert data_parallel["gradient_bytes"][rank] == 4 * matrices
        assert 8 * matrices <= data_parallel["optimizer_bytes"][rank] < 8 * matrices + 1000  # two moments
    shared = results[0, 3, 0]  # stage 2 over two ranks
    assert max(shared["optimizer_bytes"]) < 0.6 * data_parallel["optimizer_bytes"][0]
