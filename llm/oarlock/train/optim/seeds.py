"""Random seeds of a step, derived from (seed, step) alone."""

from __future__ import annotations

import random
import zlib

import numpy as np
import paddle
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

# State from which all tensor-parallel ranks must draw the same numbers. The other states are for a rank's own shard.
_SAME_ON_TENSOR_RANKS = "global_seed"


def seed_step(seed: int, step: int, data_rank: int = 0, tensor_rank: int = 0, pipeline_rank: int = 0) -> None:
    """Seed all generators for one optimizer step: Paddle's, NumPy's, Python's, and those of Fleet's RNG tracker.

    The random numbers of a step (dropout) depend only on the seed, the step and the rank's coordinates. So a resume is
    exact for any batch size without saving generator states, which Paddle can only pickle.
    """
    reseed_tracker(seed, step, data_rank, tensor_rank, pipeline_rank)
    mixed = np.random.SeedSequence([seed, step, data_rank, pipeline_rank]).generate_state(1)[0]
    paddle.seed(int(mixed) & 0x7FFFFFFF)
    np.random.seed(int(mixed))
    random.seed(int(mixed))


def reseed_tracker(seed: int, step: int, data_rank: int = 0, tensor_rank: int = 0, pipeline_rank: int = 0) -> None:
    """Seed the generators of Fleet's RNG tracker for one optimizer step.

    Some models draw dropout from these instead of the default generator, even in a single process (PaddleNLP's
    set_seed adds "global_seed" and "local_seed"). On a GPU paddle.seed, which is called here for each state, also seeds
    the CPU's default generator, so seed the default generators afterwards.
    """
    states = get_rng_state_tracker().states_
    default = paddle.incubate.get_rng_state(use_index=True)
    for name, state in states.items():
        tensor = 0 if name == _SAME_ON_TENSOR_RANKS else tensor_rank
        key = [seed, step, data_rank, pipeline_rank, tensor, zlib.crc32(name.encode())]
        paddle.incubate.set_rng_state(state, use_index=True)
        paddle.seed(int(np.random.SeedSequence(key).generate_state(1)[0]) & 0x7FFFFFFF)
    paddle.incubate.set_rng_state(default, use_index=True)
