"""Dropout under tensor parallel and tied embeddings under a pipeline, on two ranks."""

from __future__ import annotations

import contextlib

import numpy as np
import paddle
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker
from paddle.distributed.fleet.recompute import recompute
from paddle.nn import functional as F

from oarlock.environment import rank
from oarlock.models.layout import shared_between_stages
from oarlock.parallel.sync import share
from oarlock.train.seeds import reseed_tracker, seed_step

NAMES = ("global_seed", "local_seed", "model_parallel_rng")


def draw(name: str = "") -> list[float]:
    """From one of the tracker's generators, or from the default one."""
    with get_rng_state_tracker().rng_state(name) if name else contextlib.nullcontext():
        return paddle.rand([8]).tolist()


def tracker() -> None:
    """Its states are there, and apart from each other and from the default one."""
    from paddlenlp.trainer.trainer_utils import set_seed

    set_seed(42)
    assert set(get_rng_state_tracker().states_) == set(NAMES)
    first, second = ({name: draw(name) for name in ("", *NAMES)} for _ in range(2))
    assert all(first[name] != second[name] for name in first)
    theirs = share(first)
    assert theirs[0][""] == theirs[1][""] and theirs[0]["global_seed"] == theirs[1]["global_seed"]
    assert theirs[0]["local_seed"] != theirs[1]["local_seed"]


def block(x, weight):
    """Dropout from three generators, as layers that are split and layers that are not have it."""
    x = F.dropout(x, 0.3)
    with get_rng_state_tracker().rng_state("local_seed"):
        x = x * F.dropout(weight, 0.3)
    with get_rng_state_tracker().rng_state("global_seed"):
        return F.dropout(x, 0.3) + x


def recompute_draws_the_same_masks() -> None:
    def run(function) -> list[np.ndarray]:
        seed_step(1, 2)
        reseed_tracker(1, 2, tensor_rank=rank())
        x, weight = (paddle.full([400], value, "float32") for value in (1.0, 2.0))
        x.stop_gradient = weight.stop_gradient = False
        y = x
        for _ in range(3):
            y = function(block, y + 1, weight)
        y.sum().backward()
        return [y.numpy(), x.grad.numpy(), weight.grad.numpy(), *(np.array(draw(name)) for name in ("", *NAMES))]

    expected = run(lambda function, *inputs: function(*inputs))
    assert 0 < np.count_nonzero(expected[0] == 0) < 400
    for reentrant in (True, False):
        found = run(lambda function, *inputs, how=reentrant: recompute(function, *inputs, use_reentrant=how))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def reseeded_tracker() -> None:
    """A step's numbers are the same again, whatever was drawn before; see reseed_tracker."""

    def numbers(**where: int) -> dict[str, list[float]]:
        reseed_tracker(**({"seed": 1, "step": 5, "tensor_rank": rank()} | where))
        return {name: draw(name) for name in NAMES}

    first = numbers()
    assert numbers() == first
    for other in ({"step": 6}, {"seed": 2}, {"data_rank": 1}, {"pipeline_rank": 1}):
        assert not any(value == first[name] for name, value in numbers(**other).items()), other
    theirs = share(first)
    assert theirs[0]["global_seed"] == theirs[1]["global_seed"]
    assert theirs[0]["local_seed"] != theirs[1]["local_seed"]
    assert len({str(value) for value in first.values()}) == len(NAMES)
    seed_step(1, 5)
    expected = draw()
    seed_step(1, 5)
    numbers()
    assert draw() == expected  # the default one is left alone


def tied_embeddings_on_two_stages() -> None:
    """Fleet marks them nowhere, oarlock knows them."""
    from paddlenlp.transformers import LlamaConfig, LlamaForCausalLMPipe
    from patched_layers import split

    from helpers import TINY_LLAMA

    split(pp_degree=2)
    model = LlamaForCausalLMPipe(LlamaConfig(**TINY_LLAMA, tie_word_embeddings=True))
    marked = [p.name for p in model.parameters() if hasattr(p, "is_firstly_shared")]
    assert not marked, "Paddle marks shared parameters now: use is_firstly_shared in place of shared_between_stages"
    shared = [p for p in model.parameters() if p.shape == [TINY_LLAMA["vocab_size"], TINY_LLAMA["hidden_size"]]]
    assert len(shared) == 1
    assert shared_between_stages(model) == {shared[0].name: rank() == 0}
    assert shared_between_stages(LlamaForCausalLMPipe(LlamaConfig(**TINY_LLAMA))) == {}
