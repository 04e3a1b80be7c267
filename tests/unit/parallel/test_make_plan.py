"""Making a plan from a configuration, and the notes on options without effect."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oarlock.config import FinetuneConfig
from oarlock.parallel.plan import ParallelPlan
from oarlock.parallel.plan_rules import check_plan
from support.plans import FOUR_D, LLAMA, plan_of, planned

# from a configuration


@pytest.mark.parametrize(
    ("ranks", "flags", "expected"),
    [
        (4, "", "4 ranks = data 4"),
        (8, "--sharding stage2", "8 ranks = sharding 8 (stage 2)"),
        (8, "--sharding stage3 --sharding_degree 4", "8 ranks = data 2 x sharding 4 (stage 3)"),
        (4, "--tensor_parallel_degree 4", "4 ranks = tensor 4"),
        (8, "--tensor_parallel_degree 2 --sequence_parallel", "8 ranks = data 4 x tensor 2 (sequence parallel)"),
        (
            32,
            "--tensor_parallel_degree 4 --pipeline_parallel_degree 2 --sharding stage2 --sharding_parallel_degree 2",
            "32 ranks = data 2 x sharding 2 (stage 2) x tensor 4 x pipeline 2",
        ),
        (
            16,
            "--pipeline_parallel_degree 4 --virtual_pp_degree 2 --gradient_accumulation_steps 8",
            "16 ranks = data 4 x pipeline 4 (2 chunks a stage)",
        ),
        (8, "--expert_parallel_degree 4 --tensor_parallel_degree 2", "8 ranks = data 4 x tensor 2, experts over 4"),
    ],
)
def test_degrees_of_a_configuration(ranks, flags, expected):
    plan, _ = planned(ranks, *flags.split())
    assert plan.describe().split(";")[0] == expected


def test_batch_sizes_are_computed():
    flags = "--tensor_parallel_degree 2 --pipeline_parallel_degree 2 --sharding stage2 --sharding_parallel_degree 2"
    batch = "--per_device_train_batch_size 1 --gradient_accumulation_steps 4"
    plan, _ = planned(16, *flags.split(), *batch.split())
    assert (plan.replicas, plan.global_batch) == (4, 16)
    assert plan.bubble == 1 / 5
    assert plan.describe() == (
        "16 ranks = data 2 x sharding 2 (stage 2) x tensor 2 x pipeline 2; micro-batch 1 x 4 micro-batches; "
        "global batch 16"
    )
    assert ParallelPlan().describe() == "1 rank; micro-batch 1 x 1 micro-batch; global batch 1"
    assert replace(plan, pipeline=4, data=1, virtual_pipeline=2).bubble == 3 / 11


def test_sequence_parallel_pads_to_the_length_the_model_is_built_for():
    flags = ("--tensor_parallel_degree", "2", "--sequence_parallel", "--src_length", "100", "--tgt_length", "60")
    assert planned(2, *flags, kind=FinetuneConfig)[0].length_multiple == 160
    assert planned(2, "--tensor_parallel_degree", "2", kind=FinetuneConfig)[0].length_multiple == 1


# notes at the start


def test_one_process_ignores_degrees_and_reports_it():
    flags = "--tensor_parallel_degree 4 --pipeline_parallel_degree 3 --virtual_pp_degree 2 --sequence_parallel"
    plan, notes = planned(1, *flags.split(), "--sharding", "stage2", "--sharding_degree", "5")
    assert plan == ParallelPlan(micro_batch_size=8)
    assert notes == [
        "one process: --tensor_parallel_degree 4, --pipeline_parallel_degree 3, --virtual_pp_degree 2, "
        "--sharding_parallel_degree 5, --sequence_parallel, --sharding stage2 not in effect (start one process per "
        "rank with `python -m paddle.distributed.launch`; their number is the product of the degrees)"
    ]
    assert planned(1)[1] == []


@pytest.mark.parametrize(
    ("ranks", "flags", "note"),
    [
        (
            8,
            "--sharding stage2 --tensor_parallel_degree 4 --pipeline_parallel_degree 2 --gradient_accumulation_steps 2",
            "--sharding stage2: tensor x pipeline use all 8 ranks, so none are left to shard over; not in effect",
        ),
        (
            4,
            "--sharding stage1 --tensor_parallel_degree 4",
            "--sharding stage1: tensor uses all 4 ranks, so none are left to shard over; not in effect",
        ),
        (
            4,
            "--sharding stage1 --sharding_degree 1",
            "--sharding stage1: --sharding_parallel_degree 1 leaves nothing to shard (data 4); not in effect",
        ),
        (
            4,
            "--sharding stage2 --pipeline_parallel_degree 2 --gradient_accumulation_steps 2",
            "--sharding stage2 with a pipeline is not available in PaddleNLP: Fleet shards the optimizer states, "
            "Oarlock shards the gradients",
        ),
        (
            4,
            "--pipeline_parallel_degree 4 --gradient_accumulation_steps 2",
            "--gradient_accumulation_steps 2 is less than the 4 pipeline stages: each is idle for 60% of a step; with 16 it "
            "would be 16%",
        ),
    ],
)
def test_options_without_effect_are_reported(ranks, flags, note):
    assert planned(ranks, *flags.split())[1] == [note]


def test_nothing_is_reported_if_every_option_has_effect():
    flags = "--sharding stage1 --tensor_parallel_degree 2 --pipeline_parallel_degree 2 --gradient_accumulation_steps 2"
    assert planned(8, *flags.split())[1] == []


def test_stages_of_unequal_size_are_reported():
    notes = check_plan(plan_of(pipeline=3), replace(LLAMA, num_layers=10), 16)
    assert notes == [
        "--pipeline_parallel_degree 3 does not divide num_hidden_layers 10: the stages hold 3, 4, 3 layers, and the "
        "smaller ones wait for the larger ones"
    ]
    assert check_plan(FOUR_D, LLAMA, 2048) == []
