"""Every plan of up to 4 ranks, and tp2 x pp2 x sharding2 (x dp2), equals one process on the same global batch.

Losses and gradient norms of 10 steps to 1e-5 relative with clipping on, every weight after every step to 1e-5,
evaluation after them; and runs that resume from each other's checkpoints under other plans.
"""

from __future__ import annotations

from typing import Any

import pytest
from plan_runs import run_groups

from families import FAMILIES as TINY

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "llama-grouped": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2},
    "qwen2-tied": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
BATCH, STEPS = 8, 10


def plan(ranks: int, replicas: int = 1, micro: int = 2, **flags: Any) -> dict[str, Any]:
    """replicas: ranks that read different data."""
    batch = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": BATCH // (micro * replicas)}
    return {"ranks": ranks, "flags": batch | flags}


TP, PP, SH = "tensor_parallel_degree", "pipeline_parallel_degree", "sharding_parallel_degree"
UP_TO_4 = [
    plan(2, 2),
    *(plan(2, 2, sharding=stage) for stage in ("stage1", "stage2", "stage3")),
    plan(2, **{TP: 2}),
    plan(2, **{TP: 2, "sequence_parallel": 1}),
    plan(2, **{PP: 2}),
    plan(4, 4),
    *(plan(4, 4, sharding=stage) for stage in ("stage1", "stage2", "stage3")),
    *(plan(4, 4, sharding=stage, **{SH: 2}) for stage in ("stage1", "stage2", "stage3")),
    plan(4, 2, **{TP: 2}),
    *(plan(4, 2, sharding=stage, **{TP: 2}) for stage in ("stage1", "stage2", "stage3")),
    plan(4, 2, micro=1, **{PP: 2}),
    *(plan(4, 2, micro=1, sharding=stage, **{PP: 2}) for stage in ("stage1", "stage2")),
    plan(4, **{TP: 2, PP: 2}),
    plan(4, **{TP: 2, PP: 2, "sequence_parallel": 1, "recompute": 1}),
    plan(4, 2, sharding="stage2", recompute=1, **{TP: 2}),
    *(plan(4, 2, sharding=stage, **{TP: 2, "sequence_parallel": 1}) for stage in ("stage1", "stage2", "stage3")),
]
FOUR_D = [
    plan(8, 2, micro=1, sharding="stage1", **{TP: 2, PP: 2}),
    plan(8, 2, micro=1, sharding="stage2", **{TP: 2, PP: 2}),
    plan(16, 4, micro=1, sharding="stage2", **{TP: 2, PP: 2, SH: 2}),
]
FOUR_STAGES = [plan(4, micro=1, **{PP: 4})]
TENSOR_4 = [plan(4, **{TP: 4}), plan(4, **{TP: 4, "sequence_parallel": 1})]
INTERLEAVED = [
    plan(4, micro=1, **{PP: 4, "virtual_pp_degree": 2}),
    plan(4, micro=2, **{PP: 4, "virtual_pp_degree": 2}),
]


def wait_until(step: int, chosen: dict[str, Any]) -> dict[str, Any]:
    return chosen | {"stop_after": step}


# Each continues where the previous one stopped, and at least 5 steps are compared after every change of plan.
CHAINS = [
    [
        wait_until(5, plan(1)),
        wait_until(10, plan(8, 2, micro=1, sharding="stage2", **{TP: 2, PP: 2})),
        wait_until(15, plan(2, 2)),
        plan(2, 2, sharding="stage3"),
    ],
    [wait_until(5, plan(4, 4, sharding="stage3")), wait_until(10, plan(2, **{TP: 2})), plan(1)],
    [
        wait_until(5, plan(4, 2, sharding="stage1", **{TP: 2})),
        wait_until(10, plan(4, 4, sharding="stage2")),
        plan(2, **{PP: 2}),
    ],
    [
        wait_until(5, plan(2, **{PP: 2})),
        wait_until(10, plan(4, 2, sharding="stage3", **{TP: 2})),
        plan(4, 2, **{TP: 2}),
    ],
]
RESUMED_STEPS = 20
# Packs of about four examples; tests/parity/test_packed_examples.py compares them with unpacked ones.
PACKED = {"packing": 1, "packing_length": 64}
PACKED_PLANS = [
    plan(2, **{TP: 2, "sequence_parallel": 1, "recompute": 1}),
    plan(2, 2, sharding="stage2"),
    plan(4, **{TP: 2, PP: 2}),
    plan(4, **{TP: 2, PP: 2, "sequence_parallel": 1, "recompute": 1}),
    plan(2, **{PP: 2, "recompute": 1, "recompute_granularity": "core_attn"}),
    [wait_until(5, plan(2, **{PP: 2})), plan(2, 2, micro=4, sharding="stage3")],
]


def groups() -> list[dict[str, Any]]:
    common = {"batch": BATCH, "steps": STEPS}
    found = [
        {"name": f"{kind}-{model}", "model": MODELS[model], "kind": kind, "plans": [*UP_TO_4, *FOUR_D]}
        for kind in ("pretrain", "finetune")
        for model in MODELS
    ]
    found[0]["plans"] = [*found[0]["plans"], *TENSOR_4]
    found += [
        group
        | {"name": f"{group['name']}-deep", "model": group["model"] | {"num_hidden_layers": 4}, "plans": FOUR_STAGES}
        for group in found
    ]
    deep = MODELS["llama-grouped"] | {"num_hidden_layers": 8}
    found.append({"name": "interleaved", "model": deep, "kind": "pretrain", "plans": INTERLEAVED})
    resumed = {"steps": RESUMED_STEPS}
    found.append(
        {"name": "resume-llama", "model": MODELS["llama-grouped"], "kind": "finetune", "plans": CHAINS} | resumed
    )
    found.append(
        {"name": "resume-qwen2", "model": MODELS["qwen2-tied"], "kind": "pretrain", "plans": CHAINS[:1]} | resumed
    )
    packed = {"kind": "finetune", "flags": PACKED}
    found.append({"name": "packed-llama", "model": MODELS["llama-grouped"], "plans": PACKED_PLANS} | packed)
    found += [
        {"name": f"packed-{name}", "model": TINY[name] | {"model_type": name, "architectures": [architecture]}}
        | packed
        | {"plans": [plan(2, **{PP: 2, "recompute": 1})]}
        for name, architecture in (("mistral", "MistralForCausalLM"), ("gemma", "GemmaForCausalLM"))
    ]
    found.append({"name": "packed-qwen2", "model": MODELS["qwen2-tied"], "plans": [plan(2, **{PP: 2})]} | packed)
    return [common | group for group in found]


def cases() -> list[Any]:
    listed = []
    for number, group in enumerate(groups()):
        for position, chain in enumerate(group["plans"]):
            for link, each in enumerate(chain if isinstance(chain, list) else [chain]):
                words = [f"{name.removesuffix('_parallel_degree')}{value}" for name, value in each["flags"].items()]
                name = f"{group['name']}-{position}.{link}-{each['ranks']}ranks-{'-'.join(words[2:]) or 'data'}"
                listed.append(pytest.param(number, position, link, id=name))
    return listed


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[int, int, int], dict[str, Any]]:
    return run_groups(groups(), tmp_path_factory.mktemp("plans"), seconds=2400)


@pytest.mark.timeout(2400)  # the first test waits for all runs
@pytest.mark.parametrize(("group", "position", "link"), cases())
def test_a_plan_equals_one_process(results, group, position, link):
    result = results[group, position, link]
    assert result["problem"] is None, "\n".join([str(result["problem"]), *result.get("logs", [])])
    last = result["plan"].get("stop_after", groups()[group]["steps"])
    assert result["num_losses"] == last - result["steps_before"] >= 5  # no step is skipped or repeated


def test_stage_2_under_a_pipeline_keeps_half_of_the_gradients(results):
    position = UP_TO_4.index(plan(4, 2, micro=1, sharding="stage2", **{PP: 2}))
    result = results[1, position, 0]
    for kept, whole in zip(result["gradient_bytes"], result["parameter_bytes"], strict=True):
        assert kept == pytest.approx(whole / 2, rel=0.02)
    first = results[1, position - 1, 0]
    assert first["gradient_bytes"] == first["parameter_bytes"]  # stage 1 keeps them all


def test_stage_3_keeps_a_shard_of_everything(results):
    result = results[1, UP_TO_4.index(plan(4, 4, sharding="stage3")), 0]
    whole = results[1, UP_TO_4.index(plan(4, 4)), 0]
    for name in ("parameter_bytes", "gradient_bytes", "optimizer_bytes"):
        for mine, all_of_it in zip(result[name], whole[name], strict=True):
            assert mine < 0.4 * all_of_it  # a quarter, and the norms, which are too small to be sharded
