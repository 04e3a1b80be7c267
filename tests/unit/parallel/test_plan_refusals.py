"""Plans that are refused, with and without a model, and the degrees that are suggested instead."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oarlock.config import FinetuneConfig, PretrainConfig, load_config
from oarlock.errors import ConfigError
from oarlock.families.model_sizes import ModelSizes
from oarlock.parallel.plan import ParallelPlan
from oarlock.parallel.plan_rules import check_plan, find_slicing_problems
from support.plans import LLAMA, plan_of, planned


def expect_refusal(ranks: int, *flags: str, kind: type = PretrainConfig) -> str:
    with pytest.raises(ConfigError) as error:
        planned(ranks, *flags, kind=kind)
    return str(error.value)


def find_misfit(plan: ParallelPlan, seq_length: int = 2048, **sizes) -> str:
    with pytest.raises(ConfigError) as error:
        check_plan(plan, replace(LLAMA, **sizes), seq_length)
    return str(error.value)


# refused without a model


@pytest.mark.parametrize(
    ("ranks", "flags", "message"),
    [
        (
            8,
            "--tensor_parallel_degree 3 --pipeline_parallel_degree 2",
            "--tensor_parallel_degree 3 x --pipeline_parallel_degree 2 = 6 does not divide 8 ranks; nearest: 2 x 2 or "
            "4 x 2",
        ),
        (8, "--tensor_parallel_degree 3", "--tensor_parallel_degree 3 does not divide 8 ranks; nearest: 2 or 4"),
        (4, "--pipeline_parallel_degree 8", "--pipeline_parallel_degree 8 does not divide 4 ranks; nearest: 4"),
        (
            8,
            "--sharding stage2 --sharding_degree 3 --tensor_parallel_degree 2",
            "--sharding_parallel_degree 3 does not divide the 4 ranks that tensor 2 x pipeline 1 leave of 8; "
            "nearest: 2 or 4",
        ),
        (
            8,
            "--sharding_parallel_degree 4",
            "--sharding_parallel_degree 4 needs --sharding stage1, stage2 or stage3 (data parallel needs neither)",
        ),
        (
            4,
            "--sharding stage3 --pipeline_parallel_degree 2",
            "--sharding stage3 can't be combined with --pipeline_parallel_degree 2: Fleet does not support it, and "
            "each micro-batch would gather the parameters of its stage twice, forward and backward; nearest: --sharding stage2",
        ),
        (
            8,
            "--expert_parallel_degree 3 --tensor_parallel_degree 2",
            "--expert_parallel_degree 3 does not divide the 4 ranks that tensor 2 x pipeline 1 leave of 8; nearest: "
            "2 or 4",
        ),
        (
            4,
            "--expert_parallel_degree 2 --sharding stage3",
            "--sharding stage3 can't be combined with --expert_parallel_degree 2: an expert is on some of the sharding "
            "ranks only; nearest: --sharding stage1",
        ),
        (
            2,
            "--expert_parallel_degree 2 --fp16",
            "--expert_parallel_degree 2 can't be combined with --fp16, whose skipped steps would differ among the "
            "ranks; nearest: --bf16",
        ),
        (
            4,
            "--expert_parallel_degree 2 --sharding stage1 --sharding_parallel_config enable_stage1_overlap",
            "--expert_parallel_degree 2 can't be combined with enable_stage1_overlap. Drop one of the two",
        ),
        (
            4,
            "--sharding stage2 --sharding_degree 2 --bf16 --amp_master_grad",
            "--amp_master_grad with --sharding stage2 needs data 1, and these degrees make it 2; nearest: "
            "--sharding_parallel_degree 4, or --sharding stage1",
        ),
        (
            2,
            "--pipeline_parallel_degree 2 --virtual_pp_degree 2 --gradient_accumulation_steps 4",
            "--virtual_pp_degree 2 needs --pipeline_parallel_degree above 2 (Fleet's rule); got 2",
        ),
        (
            4,
            "--pipeline_parallel_degree 4 --virtual_pp_degree 2 --gradient_accumulation_steps 6",
            "--gradient_accumulation_steps 6: with --virtual_pp_degree 2, a pipeline of 4 stages takes 4 micro-batches "
            "or at least 8; nearest: 4 or 8",
        ),
        (
            4,
            "--pipeline_parallel_degree 4 --virtual_pp_degree 2 --gradient_accumulation_steps 8 "
            "--pipeline_parallel_config disable_p2p_cache_shape",
            "--virtual_pp_degree 2 can't be combined with --pipeline_parallel_config disable_p2p_cache_shape (Fleet's "
            "interleaved schedule needs that cache). Drop one of the two",
        ),
    ],
)
def test_degrees_that_do_not_work(ranks, flags, message):
    assert expect_refusal(ranks, *flags.split()) == message


def test_all_problems_of_the_degrees_are_listed():
    message = expect_refusal(8, "--sharding_degree", "4", "--tensor_parallel_degree", "5")
    assert message.startswith("2 problems with the plan for 8 ranks:\n  - --sharding_parallel_degree 4 needs")
    assert message.endswith("\n  - --tensor_parallel_degree 5 does not divide 8 ranks; nearest: 4 or 8")


def test_fine_tuning_has_no_interleaved_schedule():
    flags = "--pipeline_parallel_degree 4 --virtual_pp_degree 2 --gradient_accumulation_steps 8"
    assert "batches of equal shape" in expect_refusal(4, *flags.split(), kind=FinetuneConfig)


def test_generation_has_no_sequence_parallel():
    message = expect_refusal(
        2, "--tensor_parallel_degree", "2", "--sequence_parallel", "--do_generation", kind=FinetuneConfig
    )
    assert message.startswith("--do_generation can't be combined with --sequence_parallel")


@pytest.mark.parametrize("steps", [4, 8, 9, 11, 32])
def test_micro_batches_of_the_interleaved_schedule(steps):
    flags = f"--pipeline_parallel_degree 4 --virtual_pp_degree 2 --gradient_accumulation_steps {steps}"
    assert planned(4, *flags.split())[0].micro_batches == steps


@pytest.mark.parametrize("degrees", [{"stage": 2}, {"stage": 3}, {"stage": 3, "tensor": 2}, {"stage": 2, "tensor": 2}])
def test_sharding_with_data_and_tensor_parallel_is_accepted(degrees):
    assert check_plan(plan_of(data=2, sharding=2, **degrees), LLAMA, 2048) == []


# refused for a model


@pytest.mark.parametrize(
    ("plan", "sizes", "message"),
    [
        (
            plan_of(tensor=3, data=4),
            {"heads": 8, "kv_heads": 6, "hidden": 24, "intermediate": 48, "vocab": 48},
            "--tensor_parallel_degree 3 does not divide num_attention_heads 8; nearest: 2",
        ),
        (
            plan_of(tensor=8),
            {"kv_heads": 4},
            "--tensor_parallel_degree 8 does not divide num_key_value_heads 4; nearest: 4",
        ),
        (
            plan_of(tensor=8),
            {"hidden": 4092},
            "--tensor_parallel_degree 8 does not divide hidden_size 4,092; nearest: 4",
        ),
        (
            plan_of(tensor=4),
            {"intermediate": 11006},
            "--tensor_parallel_degree 4 does not divide intermediate_size 11,006; nearest: 2",
        ),
        (plan_of(data=2, expert=2), {}, "--expert_parallel_degree 2: llama has no experts to divide; drop the flag"),
        (
            plan_of(data=4, expert=4),
            {"experts": 6, "expert_intermediate": 1024},
            "--expert_parallel_degree 4 does not divide the 6 experts of a layer; nearest: 2",
        ),
        (
            plan_of(tensor=4),
            {"experts": 8, "expert_intermediate": 1026},
            "--tensor_parallel_degree 4 does not divide moe_intermediate_size 1,026; nearest: 2",
        ),
        (
            plan_of(tensor=2),
            {"vocab": 32001},
            "--tensor_parallel_degree 2 does not divide vocab_size 32,001; nearest: 1",
        ),
        (
            plan_of(pipeline=4, data=2),
            {"num_layers": 3},
            "--pipeline_parallel_degree 4: with num_hidden_layers 3, Paddle leaves a stage without layers; nearest: 2",
        ),
        (
            plan_of(pipeline=4),
            {"num_layers": 5},  # embedding + 1, 2, 2, norm + output layer
            "--pipeline_parallel_degree 4: with num_hidden_layers 5, Paddle leaves a stage without layers; nearest: 2",
        ),
        (
            plan_of(pipeline=4, virtual_pipeline=3, micro_batches=8),
            {},
            "--pipeline_parallel_degree 4 x --virtual_pp_degree 3 = 12 does not divide num_hidden_layers 32; nearest "
            "--virtual_pp_degree: 2 or 4",
        ),
        (
            plan_of(tensor=4, pipeline=2),
            {"family": "gptj"},
            "2 problems with the plan for 8 ranks:\n"
            "  - --tensor_parallel_degree 4: PaddleNLP has no tensor-parallel layers for gptj (`oarlock families` "
            "lists which families have them); drop the flag\n"
            "  - --pipeline_parallel_degree 2: PaddleNLP has no pipeline class for gptj (`oarlock families` lists which "
            "families have them); drop the flag",
        ),
        (
            plan_of(tensor=2, sequence_parallel=True),
            {"family": "bloom"},
            "--sequence_parallel: PaddleNLP has no sequence-parallel layers for bloom (`oarlock families` lists which "
            "families have them); drop the flag",
        ),
        (
            plan_of(tensor=2),
            {"family": "opt"},
            "--tensor_parallel_degree 2: opt has none: PaddleNLP's OPTLMHead neither sums the gradient of its input over the "
            "ranks nor gathers the logits, so the trained model would be wrong; drop the flag",
        ),
    ],
)
def test_plans_that_do_not_fit_a_model(plan, sizes, message):
    assert find_misfit(plan, **sizes) == message


def test_sequence_parallel_splits_the_sequence_evenly():
    plan = plan_of(tensor=4, sequence_parallel=True)
    assert find_misfit(plan, seq_length=1022) == (
        "--sequence_parallel: sequences of 1,022 tokens (--max_seq_length; --src_length + --tgt_length or "
        "--packing_length) are not divisible by --tensor_parallel_degree 4; nearest: 1,020 or 1,024"
    )
    assert find_misfit(plan, seq_length=3).endswith("nearest: 4")


def test_all_problems_with_a_model_are_listed():
    plan = plan_of(tensor=8, pipeline=4, sharding=2, stage=3, sequence_parallel=True)
    message = find_misfit(plan, seq_length=100, heads=28, kv_heads=4, num_layers=2)
    for words in ("stage3", "num_attention_heads 28", "num_key_value_heads 4", "num_hidden_layers 2", "100 tokens"):
        assert words in message
    assert message.startswith("5 problems")


@given(
    tensor=st.integers(2, 12),
    others=st.integers(1, 6),
    heads=st.integers(1, 4).map(lambda n: 2**n),
    groups=st.sampled_from([1, 2, 4]),
    intermediate=st.integers(32, 200),
)
def test_the_suggested_degree_is_valid(tensor, others, heads, groups, intermediate):
    world_size = tensor * others
    sizes = ModelSizes("llama", 4, 16 * heads, intermediate, heads, max(1, heads // groups), 240)
    try:
        check_plan(plan_of(tensor=tensor, data=others), sizes, 64)
    except ConfigError as error:
        for word in re.findall(r"nearest: (\d+)(?: or (\d+))?", str(error)):
            for degree in (int(number) for number in word if number):
                check_plan(plan_of(tensor=degree, data=world_size // degree), sizes, 64)


def test_norms_are_not_sliced_under_sequence_parallel():
    plan = ParallelPlan(world_size=4, tensor=2, sharding=2, stage=3, sequence_parallel=True)
    sizes = ModelSizes("llama", 2, 64, 128, 4, 4, 128)
    words = ["--do_train", "--stage3_min_elements"]
    (problem,) = find_slicing_problems(load_config(PretrainConfig, [*words, "63"]).config, plan, sizes)
    assert "--stage3_min_elements 63" in problem and "nearest: 64" in problem
    assert not find_slicing_problems(load_config(PretrainConfig, [*words, "64"]).config, plan, sizes)
    assert not find_slicing_problems(load_config(PretrainConfig, ["--do_train"]).config, plan, sizes)
