"""Mixtures of experts under parallel plans: layers beside one process, and whole runs beside one process.

Whole runs are compared as in test_plans.py: losses, gradient norms and every weight after every step. The factor of the
load balancing loss is 50 times the usual one, so that its gradient counts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plan_runs import run_groups

QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.05,
}
QWEN2 = QWEN3 | {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "shared_expert_intermediate_size": 16,
    "norm_topk_prob": False,
}
QWEN2.pop("head_dim")
BATCH, STEPS = 8, 3
EP, TP, PP = "expert_parallel_degree", "tensor_parallel_degree", "pipeline_parallel_degree"


def plan(ranks: int, replicas: int, **flags: Any) -> dict[str, Any]:
    """Micro-batches are those of one process, because the balance of a load is that of a micro-batch."""
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": BATCH // (2 * replicas)}
    return {"ranks": ranks, "flags": batch | flags}


PRETRAINED = [
    plan(2, 2, **{EP: 2}),
    plan(2, 2, sharding="stage1", **{EP: 2}),
    plan(4, 2, **{TP: 2, EP: 2}),
    plan(4, 4, sharding="stage1", sharding_parallel_degree=2, **{EP: 2}),
]
TUNED = [
    plan(4, 2, sharding="stage1", sequence_parallel=1, **{TP: 2, EP: 2}),
    plan(4, 2, sharding="stage1", recompute=1, **{PP: 2, EP: 2}),
]
# A checkpoint of experts on four ranks goes on in one process, and then on two ranks each of which has all of them.
CHAIN = [
    plan(4, 4, sharding="stage1", **{EP: 4}) | {"stop_after": 2},
    plan(1, 1) | {"stop_after": 4},
    plan(2, 2) | {"stop_after": 6},
    plan(4, 2, **{TP: 2, EP: 2}),
]
LORA = {"lora": 1, "lora_target_modules": "q_proj,gate_proj,down_proj", "r": 2}
GROUPS: list[dict[str, Any]] = [
    {"name": "qwen3", "model": QWEN3, "kind": "pretrain", "plans": PRETRAINED, "steps": STEPS},
    {"name": "qwen2", "model": QWEN2, "kind": "finetune", "plans": TUNED, "steps": STEPS},
    {"name": "resumed", "model": QWEN3, "kind": "finetune", "plans": [CHAIN], "steps": 8},
    {"name": "lora", "model": QWEN3, "kind": "finetune", "plans": PRETRAINED[1:2], "steps": STEPS, "flags": LORA},
]


def cases() -> list[Any]:
    return [
        pytest.param(number, position, link, id=f"{group['name']}-{position}.{link}")
        for number, group in enumerate(GROUPS)
        for position, chain in enumerate(group["plans"])
        for link in range(len(chain) if isinstance(chain, list) else 1)
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_groups([{"batch": BATCH} | group for group in GROUPS], tmp_path_factory.mktemp("plans"), seconds=600)


@pytest.mark.timeout(600)  # the first one waits for all the runs
@pytest.mark.parametrize(("group", "position", "link"), cases())
def test_a_plan_equals_one_process(results, group, position, link, record_property):
    result = results[group, position, link]
    record_property("model", GROUPS[group]["model"]["model_type"])
    record_property("plans", result.get("difference"))
    assert result["problem"] is None, "\n".join([str(result["problem"]), *result.get("logs", [])])
    last = result["plan"].get("stop_after", GROUPS[group]["steps"])
    assert result["num_losses"] == last - result["steps_before"] >= 2  # no step left out or done twice


def test_a_rank_holds_its_share_of_the_experts(results):
    for result in (results[0, 0, 0], results[0, 1, 0]):
        whole = results[2, 0, 1]["parameter_bytes"][0]
        experts = 2 * 8 * 3 * 32 * 24 * 4  # layers, experts, matrices, hidden, inner, bytes
        assert result["parameter_bytes"] == [whole - experts / 2] * 2


def test_layers_equal_one_process(tmp_path):
    script = Path(__file__).with_name("expert_layers.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=200, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) == 18  # ranks of all plans
