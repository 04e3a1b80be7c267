"""Families that together have every part of the own decoder, under plans of up to 4 ranks, against one process.

(Mixtures of experts have a file of their own, test_plans.py has Llama and Qwen2 under every plan.)
"""

from __future__ import annotations

from typing import Any

import pytest
from plan_runs import run_groups
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
}
WIDE = {"tensor-pipeline-stage2": plan(8, 2, micro=1, sharding="stage2", **{TP: 2, PP: 2, SH: 2})}
FEW = ("sequence-recompute", "tensor-pipeline", "stage3")
# What each has that others have not.
CHOSEN = {
    "llama": [*PLANS, *WIDE],
    "gemma": [*PLANS],
    "qwen3": [*PLANS],  # norms of queries and keys by head
    "gemma2": [*PLANS, *WIDE],  # norms around both parts, soft caps, windows, tied
    "phi3": [*FEW, "tensor"],  # packed projections, which tensor parallelism cuts inside
    "glm4": FEW,  # interleaved partial rotary embedding
    "olmo2": [*FEW, "tensor"],  # norms over all heads, which are on several ranks
    "granite": FEW,  # multipliers
    "smollm3": FEW,  # layers without positions
}
CASES = [
    (family, way)
    for family, ways in CHOSEN.items() if family in FAMILIES
    for way in ways
]  # fmt: skip


def group(family: str) -> dict[str, Any]:
    model = TINY_CONFIGS[family] | {"architectures": [FAMILIES[family].architecture]}
    plans = [(PLANS | WIDE)[way] for name, way in CASES if name == family]
    return {"kind": "finetune", "batch": BATCH, "steps": STEPS, "whole": True, "model": model, "plans": plans}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[str, str], dict[str, Any]]:
    families = list(dict.fromkeys(family for family, _ in CASES))
    found = run_groups([group(family) for family in families], tmp_path_factory.mktemp("plans"), seconds=900)
    ways = {family: [way for name, way in CASES if name == family] for family in families}
    return {
        (families[number], ways[families[number]][position]): result for (number, position, _), result in found.items()
    }


@pytest.mark.timeout(900)  # the first one waits for all the runs
@pytest.mark.parametrize(("family", "way"), CASES)
def test_a_plan_equals_one_process(results, family, way, record_property):
    result = results[family, way]
    assert result["problem"] is None, "\n".join([str(result["problem"]), *result.get("logs", [])])
    assert result["num_losses"] == STEPS
    record_property("plans", result["difference"])
