"""The parallel plan: ranks and groups as Paddle has them, degrees from a configuration, and every refusal."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.config import FinetuneConfig, PretrainConfig, load_config
from oarlock.errors import ConfigError
from oarlock.parallel.family_rules import FAMILIES, ModelSizes
from oarlock.parallel.make_plan import make_plan
from oarlock.parallel.plan import AXES, Coordinates, ParallelPlan, cut_layers
from oarlock.parallel.plan_rules import check_plan, slicing_problems

LLAMA = ModelSizes("llama", num_layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, vocab=32000)
FOUR_D = ParallelPlan(32, 2, 2, 2, 4, 2, micro_batches=4)


def plan_of(**degrees: int) -> ParallelPlan:
    """A plan whose ranks are the product of the degrees."""
    sizes = {axis: degrees.pop(axis, 1) for axis in AXES}
    world_size = sizes["data"] * sizes["pipeline"] * sizes["sharding"] * sizes["tensor"]
    stage = degrees.pop("stage", 1 if sizes["sharding"] > 1 else 0)
    return ParallelPlan(world_size=world_size, stage=stage, **sizes, **degrees)


def planned(ranks: int, *flags: str, kind: type = PretrainConfig) -> tuple[ParallelPlan, list[str]]:
    return make_plan(load_config(kind, ["--do_train", *flags]).config, ranks)


def refused(ranks: int, *flags: str, kind: type = PretrainConfig) -> str:
    with pytest.raises(ConfigError) as error:
        planned(ranks, *flags, kind=kind)
    return str(error.value)


def misfit(plan: ParallelPlan, seq_length: int = 2048, **sizes) -> str:
    with pytest.raises(ConfigError) as error:
        check_plan(plan, replace(LLAMA, **sizes), seq_length)
    return str(error.value)


plans = st.builds(
    lambda data, pipeline, sharding, tensor: plan_of(data=data, pipeline=pipeline, sharding=sharding, tensor=tensor),
    *[st.integers(1, 4)] * 4,
)

# ranks and groups


@given(plans)
def test_ranks_and_coordinates_are_one_to_one(plan):
    where = [plan.coordinates(rank) for rank in range(plan.world_size)]
    assert [plan.rank(at) for at in where] == list(range(plan.world_size))
    assert len(set(where)) == plan.data * plan.pipeline * plan.sharding * plan.tensor == plan.world_size
    assert all(at < plan.shape and min(at) >= 0 for at in where)


@given(plans, st.sampled_from(AXES))
def test_groups_partition_the_ranks_and_differ_along_their_axis_only(plan, axis):
    groups = plan.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(plan.world_size))
    for group in groups:
        where = [plan.coordinates(rank)._asdict() for rank in group]
        assert [at.pop(axis) for at in where] == list(range(getattr(plan, axis)))
        assert all(at == where[0] for at in where)


@given(plans)
def test_ranks_that_hold_one_copy_of_the_model_read_the_same_data(plan):
    readers = Counter(plan.dataset_rank(rank) for rank in range(plan.world_size))
    assert readers == dict.fromkeys(range(plan.replicas), plan.tensor * plan.pipeline)


@pytest.mark.parametrize(
    "plan", [plan_of(), plan_of(data=3), plan_of(tensor=2, pipeline=2, sharding=2), plan_of(data=2, tensor=4), FOUR_D]
)
def test_groups_are_paddles(plan):
    from paddle.distributed.fleet.base.topology import CommunicateTopology

    names = {"data": "data", "pipeline": "pipe", "sharding": "sharding", "tensor": "model"}
    dims = [plan.data, plan.pipeline, plan.sharding, 1, plan.tensor]
    topology = CommunicateTopology(["data", "pipe", "sharding", "sep", "model"], dims)
    for axis in AXES:
        assert plan.groups(axis) == topology.get_comm_list(names[axis])
    for rank in range(plan.world_size):
        at = topology.get_coord(rank)
        assert plan.coordinates(rank) == (at.data, at.pipe, at.sharding, at.model)


def test_the_order_of_the_axes_is_the_one_paddlenlp_gives_fleet():
    source = Path(importlib.util.find_spec("paddlenlp").origin).parent / "trainer/training_args.py"
    text = " ".join(source.read_text().split())
    assert 'if self.hybrid_parallel_topo_order is None: self.hybrid_parallel_topo_order = "pp_first"' in text
    first = 'order = ["dp", "pp", "sharding", "sep", "mp"]'
    assert f'if self.hybrid_parallel_topo_order == "pp_first": if is_segment_parallel_supported(): {first}' in text
    assert "max(self.sharding_parallel_degree, 1) * self.data_parallel_rank + self.sharding_parallel_rank" in text


def test_a_rank_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="rank 32 is not among 32 ranks"):
        FOUR_D.coordinates(32)


@pytest.mark.parametrize(
    "fields",
    [
        {"world_size": 3, "data": 2},
        {"data": 0},
        {"world_size": 2, "sharding": 2},
        {"stage": 2},
        {"sequence_parallel": True},
    ],
)
def test_a_plan_that_does_not_add_up_can_not_be_made(fields):
    with pytest.raises(ValueError):
        ParallelPlan(**fields)


@pytest.mark.parametrize(
    ("degrees", "strategy"),
    [
        ({"data": 2, "pipeline": 2}, "none"),
        ({"sharding": 2, "stage": 1}, "optimizer"),
        ({"sharding": 2, "stage": 1, "pipeline": 2}, "optimizer"),
        ({"sharding": 2, "stage": 2, "tensor": 2}, "gradients"),
        ({"sharding": 2, "stage": 2, "pipeline": 2}, "gradients_hooked"),
        ({"sharding": 2, "stage": 3}, "parameters"),
    ],
)
def test_stage_and_pipeline_decide_the_sharding_strategy(degrees, strategy):
    assert plan_of(**degrees).sharding_strategy == strategy


# layers


def paddle_cut(num_layers: int, pipeline: int, virtual: int) -> list[list[int]] | None:
    """The layers of each piece as PaddleNLP's pipe classes and SegmentLayers cut them; None where they refuse."""
    from paddle import nn
    from paddle.distributed.fleet.meta_parallel.parallel_layers.pp_layers import LayerDesc, SegmentLayers

    class LlamaDecoderLayerPipe(nn.Layer):
        pass

    descs = [LayerDesc(kind) for kind in (nn.Embedding, *[LlamaDecoderLayerPipe] * num_layers, nn.LayerNorm, nn.Linear)]
    method = "uniform" if num_layers % pipeline else "layer:LlamaDecoderLayer"
    if virtual > 1 and method == "uniform":
        return None
    try:
        bounds = SegmentLayers(descs, pipeline, method, virtual if virtual > 1 else None).do_segment()
    except AssertionError:
        return None
    pieces = [range(start, stop) for start, stop in itertools.pairwise(bounds)]
    return [[item - 1 for item in piece if 1 <= item <= num_layers] for piece in pieces]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 3))
def test_layers_are_cut_as_paddle_cuts_them(num_layers, pipeline, virtual):
    try:
        ours = [list(piece) for piece in cut_layers(num_layers, pipeline, virtual)]
    except ValueError:
        ours = None
    assert ours == paddle_cut(num_layers, pipeline, virtual)


def test_a_stage_holds_its_chunks():
    plan = plan_of(pipeline=4, virtual_pipeline=2, micro_batches=8)
    assert plan.layers(0, 16) == [range(2), range(8, 10)]
    assert plan.layers(3, 16) == [range(6, 8), range(14, 16)]
    assert plan_of(pipeline=2).layers(0, 5) == [range(3)]  # the embedding counts as one of Paddle's items


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
    ],
)
def test_degrees_of_a_configuration(ranks, flags, expected):
    plan, _ = planned(ranks, *flags.split())
    assert plan.describe().split(";")[0] == expected


def test_the_arithmetic_of_the_batch():
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


# said at the start


def test_one_process_sets_degrees_aside_and_says_so():
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
            "--sharding stage2 with a pipeline is not available in PaddleNLP: Fleet shards the optimizer states, Oarlock "
            "shards the gradients",
        ),
        (
            4,
            "--pipeline_parallel_degree 4 --gradient_accumulation_steps 2",
            "--gradient_accumulation_steps 2 is less than the 4 pipeline stages: each is idle for 60% of a step; with 16 it "
            "would be 16%",
        ),
    ],
)
def test_what_is_not_as_it_seems_is_said(ranks, flags, note):
    assert planned(ranks, *flags.split())[1] == [note]


def test_nothing_is_said_where_all_is_in_effect():
    flags = "--sharding stage1 --tensor_parallel_degree 2 --pipeline_parallel_degree 2 --gradient_accumulation_steps 2"
    assert planned(8, *flags.split())[1] == []


def test_stages_of_unequal_size_are_said():
    notes = check_plan(plan_of(pipeline=3), replace(LLAMA, num_layers=10), 16)
    assert notes == [
        "--pipeline_parallel_degree 3 does not divide num_hidden_layers 10: the stages hold 3, 4, 3 layers, and the "
        "smaller ones wait for the larger ones"
    ]
    assert check_plan(FOUR_D, LLAMA, 2048) == []


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
    assert refused(ranks, *flags.split()) == message


def test_all_problems_of_the_degrees_are_listed():
    message = refused(8, "--sharding_degree", "4", "--tensor_parallel_degree", "5")
    assert message.startswith("2 problems with the plan for 8 ranks:\n  - --sharding_parallel_degree 4 needs")
    assert message.endswith("\n  - --tensor_parallel_degree 5 does not divide 8 ranks; nearest: 4 or 8")


def test_fine_tuning_has_no_interleaved_schedule():
    flags = "--pipeline_parallel_degree 4 --virtual_pp_degree 2 --gradient_accumulation_steps 8"
    assert "batches of equal shape" in refused(4, *flags.split(), kind=FinetuneConfig)


def test_generation_has_no_sequence_parallel():
    message = refused(2, "--tensor_parallel_degree", "2", "--sequence_parallel", "--do_generation", kind=FinetuneConfig)
    assert message.startswith("--do_generation can't be combined with --sequence_parallel")


@pytest.mark.parametrize("steps", [4, 8, 9, 11, 32])
def test_micro_batches_of_the_interleaved_schedule(steps):
    flags = f"--pipeline_parallel_degree 4 --virtual_pp_degree 2 --gradient_accumulation_steps {steps}"
    assert planned(4, *flags.split())[0].micro_batches == steps


@pytest.mark.parametrize("degrees", [{"stage": 2}, {"stage": 3}, {"stage": 3, "tensor": 2}, {"stage": 2, "tensor": 2}])
def test_sharding_with_data_and_tensor_is_fine(degrees):
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
            "  - --tensor_parallel_degree 4: PaddleNLP has no tensor-parallel layers for gptj (it has for llama, qwen2, "
            "mistral, gemma, bloom, chatglm, chatglm_v2, glm); drop the flag\n"
            "  - --pipeline_parallel_degree 2: PaddleNLP has no pipeline class for gptj (it has for llama, qwen2, gemma, "
            "chatglm_v2); drop the flag",
        ),
        (
            plan_of(tensor=2, sequence_parallel=True),
            {"family": "mistral"},
            "--sequence_parallel: PaddleNLP has no sequence-parallel layers for mistral (it has for llama, qwen2, "
            "chatglm_v2); drop the flag",
        ),
        (
            plan_of(tensor=2),
            {"family": "opt"},
            "--tensor_parallel_degree 2: opt has none: PaddleNLP's OPTLMHead neither sums its input's gradient over the "
            "ranks nor gathers the scores, so that two ranks would train another model; drop the flag",
        ),
    ],
)
def test_plans_that_do_not_fit_a_model(plan, sizes, message):
    assert misfit(plan, **sizes) == message


def test_sequence_parallel_splits_the_sequence_evenly():
    plan = plan_of(tensor=4, sequence_parallel=True)
    assert misfit(plan, seq_length=1022) == (
        "--sequence_parallel: sequences of 1,022 tokens (--max_seq_length; --src_length + --tgt_length or "
        "--packing_length) are not divisible by --tensor_parallel_degree 4; nearest: 1,020 or 1,024"
    )
    assert misfit(plan, seq_length=3).endswith("nearest: 4")


def test_all_problems_with_a_model_are_listed():
    plan = plan_of(tensor=8, pipeline=4, sharding=2, stage=3, sequence_parallel=True)
    message = misfit(plan, seq_length=100, heads=28, kv_heads=4, num_layers=2)
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
def test_the_nearest_degree_named_is_legal(tensor, others, heads, groups, intermediate):
    world_size = tensor * others
    sizes = ModelSizes("llama", 4, 16 * heads, intermediate, heads, max(1, heads // groups), 240)
    try:
        check_plan(plan_of(tensor=tensor, data=others), sizes, 64)
    except ConfigError as error:
        for word in re.findall(r"nearest: (\d+)(?: or (\d+))?", str(error)):
            for degree in (int(number) for number in word if number):
                check_plan(plan_of(tensor=degree, data=world_size // degree), sizes, 64)


# families


def test_what_paddlenlp_can_split_is_what_the_table_says():
    transformers = Path(importlib.util.find_spec("paddlenlp").origin).parent / "transformers"
    for family, support in FAMILIES.items():
        source = (transformers / family / "modeling.py").read_text()
        assert support.tensor == ("ColumnParallelLinear(" in source and family != "opt"), family  # whose head is wrong
        # Gemma reads it and fails (GemmaModel.forward, inputs_embeds.shape before the embedding is asked).
        assert support.sequence == ("config.sequence_parallel" in source and family != "gemma"), family
        assert support.pipeline == (transformers / family / "modeling_pp.py").exists(), family


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("Llama", {"num_key_value_heads": 8}, ModelSizes("llama", 32, 4096, 11008, 32, 8, 32000)),
        ("Qwen2", {"tie_word_embeddings": True}, ModelSizes("qwen2", 32, 4096, 22016, 32, 32, 151936, tied=True)),
        ("ChatGLMv2", {"multi_query_group_num": 2}, ModelSizes("chatglm_v2", 28, 4096, 13696, 32, 2, 65024)),
        ("ChatGLM", {}, ModelSizes("chatglm", 28, 4096, 16384, 32, 32, 130528, tied=True)),
        ("GLM", {}, ModelSizes("glm", 24, 1024, 4096, 16, 16, 30592, tied=True)),
        ("Bloom", {"n_layer": 6, "n_head": 4}, ModelSizes("bloom", 6, 64, 256, 4, 4, 250880, tied=True)),
        ("GPTJ", {"n_embd": 2048}, ModelSizes("gptj", 28, 2048, 8192, 16, 16, 50400)),
        ("OPT", {}, ModelSizes("opt", 24, 2048, 8192, 32, 32, 50272, tied=True)),
    ],
)
def test_sizes_are_read_from_every_familys_configuration(name, options, expected):
    import paddlenlp.transformers as families

    assert ModelSizes.of(getattr(families, f"{name}Config")(**options)) == expected


def test_a_configuration_without_layers_is_an_error():
    with pytest.raises(ValueError, match="type x without num_hidden_layers"):
        ModelSizes.of(SimpleNamespace(model_type="x", hidden_size=8, num_attention_heads=2))


def test_plans_need_no_paddle():
    code = "import sys, oarlock.parallel.make_plan\nassert not {'paddle', 'paddlenlp', 'numpy'} & set(sys.modules)"
    root = Path(__file__).resolve().parents[3] / "llm"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=300)


def test_coordinates_have_names():
    assert FOUR_D.coordinates(13) == Coordinates(data=0, pipeline=1, sharding=1, tensor=1)


def test_norms_are_not_sliced_under_sequence_parallel():
    plan = ParallelPlan(world_size=4, tensor=2, sharding=2, stage=3, sequence_parallel=True)
    sizes = ModelSizes("llama", 2, 64, 128, 4, 4, 128)
    words = ["--do_train", "--stage3_min_elements"]
    (problem,) = slicing_problems(load_config(PretrainConfig, [*words, "63"]).config, plan, sizes)
    assert "--stage3_min_elements 63" in problem and "nearest: 64" in problem
    assert not slicing_problems(load_config(PretrainConfig, [*words, "64"]).config, plan, sizes)
    assert not slicing_problems(load_config(PretrainConfig, ["--do_train"]).config, plan, sizes)
