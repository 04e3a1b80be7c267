"""The parallel plan: ranks, groups and layers as Paddle has them."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from oarlock.parallel.plan import AXES, Coordinates, ParallelPlan, cut_layers
from support.plans import FOUR_D, plan_of

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


@given(plans, st.integers(1, 8))
def test_experts_are_divided_among_consecutive_replicas_of_the_same_stage_and_tensor_rank(plan, expert):
    assume(plan.replicas % expert == 0)
    plan = replace(plan, expert=expert)
    for groups, size in (
        (plan.compute_expert_groups(), expert),
        (plan.compute_expert_copies(), plan.replicas // expert),
    ):
        assert sorted(rank for group in groups for rank in group) == list(range(plan.world_size))
        assert {len(group) for group in groups} == {size}
        for group in groups:
            assert len({plan.coordinates(rank)[1::2] for rank in group}) == 1  # pipeline and tensor
    assert all(
        [plan.find_expert_rank(rank) for rank in group] == list(range(expert)) for group in plan.compute_expert_groups()
    )
    assert all(len({plan.find_expert_rank(rank) for rank in group}) == 1 for group in plan.compute_expert_copies())


@pytest.mark.parametrize(
    "plan", [plan_of(), plan_of(data=3), plan_of(tensor=2, pipeline=2, sharding=2), plan_of(data=2, tensor=4), FOUR_D]
)
def test_groups_equal_paddle(plan):
    from paddle.distributed.fleet.base.topology import CommunicateTopology

    names = {"data": "data", "pipeline": "pipe", "sharding": "sharding", "tensor": "model"}
    dims = [plan.data, plan.pipeline, plan.sharding, 1, plan.tensor]
    topology = CommunicateTopology(["data", "pipe", "sharding", "sep", "model"], dims)
    for axis in AXES:
        assert plan.groups(axis) == topology.get_comm_list(names[axis])
    for rank in range(plan.world_size):
        at = topology.get_coord(rank)
        assert plan.coordinates(rank) == (at.data, at.pipe, at.sharding, at.model)


def test_the_axis_order_equals_paddlenlp():
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
def test_an_inconsistent_plan_is_an_error(fields):
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
    """The layers of each chunk as split by PaddleNLP's pipe classes and SegmentLayers; None where they refuse."""
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
def test_layers_are_split_as_by_paddle(num_layers, pipeline, virtual):
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


def test_plans_need_no_paddle():
    code = "import sys, oarlock.parallel.make_plan\nassert not {'paddle', 'paddlenlp', 'numpy'} & set(sys.modules)"
    root = Path(__file__).resolve().parents[3] / "llm"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=300)


def test_coordinates_have_names():
    assert FOUR_D.coordinates(13) == Coordinates(data=0, pipeline=1, sharding=1, tensor=1)
