"""Models on four ranks (tensor 2 x pipeline 2, and smaller plans), and checks of their shards."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from loading_folders import values, write

PLANS = {"plain": (1, False), "tensor": (2, False), "pipeline": (1, True), "both": (2, True)}


def configuration(plan: str, **changes):
    import paddle.distributed.fleet as fleet
    from paddlenlp.transformers import LlamaConfig

    from helpers import TINY_LLAMA

    config = LlamaConfig(**(TINY_LLAMA | changes))
    config.tensor_parallel_degree = PLANS[plan][0]
    if config.tensor_parallel_degree > 1:
        config.tensor_parallel_rank = fleet.get_hybrid_communicate_group().get_model_parallel_rank()
        config.tensor_parallel_output = False
    return config


def build(folder: Path, config, plan: str, dtype: str = "float32", allow_pickle: bool = False, random: bool = False):
    from oarlock.models.build import ModelSource, build_model

    source = ModelSource(folder, config, from_weights=not random)
    return build_model(source, dtype, allow_pickle, seed=11, pipeline=PLANS[plan][1])


def check(model, expected, dtype=np.float32, buffers: bool = True) -> None:
    """Every parameter of this rank is the right slice of the full one."""
    from oarlock.weights.layout import parameter_shards

    for parameter in parameter_shards(model):
        if not buffers and not hasattr(parameter.tensor, "trainable"):
            continue
        found = parameter.tensor.astype("float32").numpy()
        part = parameter.slice.cut(expected(parameter.name, parameter.slice.shape))
        assert np.array_equal(found, part.astype(dtype).astype(np.float32)), parameter.name
    assert all(parameter._is_initialized() for parameter in model.parameters())


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir())


def load_and_check(folder: Path, plan: str, form: str, dtype=np.float32, allow_pickle=False, **changes) -> None:
    config = configuration(plan, **changes)
    write(folder, config, form)
    before = listing(folder)
    model = build(folder, config, plan, allow_pickle=allow_pickle)
    check(model, values, dtype)
    assert listing(folder) == before, "something was written into the source folder"


@contextlib.contextmanager
def two_nodes():
    """Two ranks per node, as with two launchers on this host."""
    from oarlock.environment.ranks import rank
    from oarlock.parallel.nodes import find_node

    before = os.environ["PADDLE_RANK_IN_NODE"]
    os.environ["PADDLE_RANK_IN_NODE"] = str(rank() % 2)
    find_node.cache_clear()
    try:
        yield
    finally:
        os.environ["PADDLE_RANK_IN_NODE"] = before
        find_node.cache_clear()


def expect_failure(action, message: str, first: int = 0) -> None:
    """The first rank that fails reports the reason; the others stop silently."""
    from oarlock.environment.ranks import rank
    from oarlock.errors import OarlockError, StoppedWithOthers

    with pytest.raises(OarlockError) as caught:
        action()
    assert isinstance(caught.value, StoppedWithOthers) == (rank() != first)
    assert (message if rank() == first else f"rank {first} ") in str(caught.value)
