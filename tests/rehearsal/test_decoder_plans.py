"""Families that together have every part of our decoder, under plans of up to 4 ranks (8 once), against one process.

test_expert_plans.py has expert parallelism, test_plans.py Llama and Qwen2 under every plan.
"""

from __future__ import annotations

from typing import Any

import pytest
from plan_runs import run_groups
from test_family_plans import METHODS
from test_plans import BATCH, PP, SH, TP, plan

from oarlock.families.registry import FAMILIES
from support.tiny_configs import TINY_CONFIGS

STEPS = 4
PLANS = {
    "tensor": plan(2, **{TP: 2}),
    "sequence-recompute": plan(2, **{TP: 2, "sequence_parallel": 1, "recompute": 1}),
    "pipeline": plan(2, **{PP: 2}),
    "stage1": plan(2, 2, sharding="stage1"),
    "stage3": plan(2, 2, sharding="stage3"),
    "tensor-pipeline": plan(4, **{TP: 2, PP: 2}),
    "tensor-stage2": plan(4, 2, sharding="stage2", **{TP: 2}),
    "pipeline-stage2": plan(4, 2, micro=1, sharding="stage2", **{PP: 2}),
    "tensor-pipeline-stage2": plan(8, 2, micro=1, sharding="stage2", **{TP: 2, PP: 2, SH: 2}),
}
FEW = ("sequence-recompute", "tensor-pipeline", "stage3")
# Families by what they have that others have not.
CHOSEN: dict[tuple[str, str], tuple[str, ...]] = {
    ("qwen3", "full"): tuple(PLANS)[:-1],  # norms of queries and keys by head
    ("gemma2", "full"): tuple(PLANS),  # norms before and after, soft caps, windows, tied
    ("phi3", "full"): (*FEW, "tensor"),  # packed projections, inside of which tensor parallelism cuts
    ("glm4", "full"): FEW,  # interleaved partial rotary embedding, biases
    ("olmo2", "full"): (*FEW, "tensor"),  # norms over all heads, which are on several ranks
    ("granite", "full"): FEW,  # multipliers
    ("smollm3", "full"): FEW,  # layers without positions
    ("deepseek_v3", "full"): FEW,  # latent attention, groups of experts
    ("mixtral", "full"): ("tensor",),
    ("deepseek_v2", "full"): ("tensor",),  # another router
    ("gemma3_text", "full"): ("tensor-pipeline",),  # a rotary embedding for each kind of layer
    ("phi3", "lora"): ("tensor", "sequence-recompute", "pipeline"),
    ("olmo2", "lora"): ("tensor",),
    ("gemma2", "lora"): ("pipeline",),
    ("qwen3", "prefix"): ("tensor",),
    ("gemma2", "p_tuning"): ("tensor",),
}
CASES = [
    pytest.param(number, position, id=f"{family}-{method}-{way}")
    for number, ((family, method), ways) in enumerate(CHOSEN.items())
    for position, way in enumerate(ways)
]


def make_group(family: str, method: str, ways: tuple[str, ...]) -> dict[str, Any]:
    model = TINY_CONFIGS[family] | {"architectures": [FAMILIES[family].architecture]}
    common = {"kind": "finetune", "batch": BATCH, "steps": STEPS, "whole": True, "flags": METHODS[method]}
    return common | {"model": model, "plans": [PLANS[way] for way in ways]}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[int, int], dict[str, Any]]:
    groups = [make_group(*chosen, ways) for chosen, ways in CHOSEN.items()]
    found = run_groups(groups, tmp_path_factory.mktemp("plans"), seconds=900)
    return {(number, position): result for (number, position, _), result in found.items()}


@pytest.mark.timeout(900)  # the first one waits for all the runs
@pytest.mark.parametrize(("number", "position"), CASES)
def test_a_plan_equals_one_process(results, number, position, record_property):
    result = results[number, position]
    record_property("plans", result.get("difference"))
    assert result["problem"] is None, "\n".join([str(result["problem"]), *result.get("logs", [])])
    assert result["num_losses"] == STEPS
