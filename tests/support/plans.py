"""Plans for tests."""

from __future__ import annotations

from oarlock.config import PretrainConfig, load_config
from oarlock.families.model_sizes import ModelSizes
from oarlock.parallel.make_plan import make_plan
from oarlock.parallel.plan import AXES, ParallelPlan

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
