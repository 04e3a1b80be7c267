"""Random numbers of a step, from (seed, step) alone."""

from __future__ import annotations

import random
import zlib

import numpy as np
import paddle
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

# What every tensor-parallel rank must draw alike; the tracker's other states are for a rank's own part of a tensor.
_SAME_ON_TENSOR_RANKS = "global_seed"


def seed_step(seed: int, step: int, data_rank: int = 0, tensor_rank: int = 0, pipeline_rank: int = 0) -> None:
    """Seed all generators for one optimizer step: Paddle's, NumPy's, Python's, and those of Fleet's RNG tracker.

    A step's random numbers (dropout) depend on the seed, the step and the place in the plan alone, which makes a resume
    exact under any batch size without keeping generator states (Paddle's can only be kept in a pickle).
    """
    reseed_tracker(seed, step, data_rank, tensor_rank, pipeline_rank)
    mixed = np.random.SeedSequence([seed, step, data_rank, pipeline_rank]).generate_state(1)[0]
    paddle.seed(int(mixed) & 0x7FFFFFFF)
    np.random.seed(int(mixed))
    random.seed(int(mixed))


def reseed_tracker(seed: int, step: int, data_rank: int = 0, tensor_rank: int = 0, pipeline_rank: int = 0) -> None:
    """Seed the generators of Fleet's RNG tracker for one optimizer step.

    Some models draw dropout from these and not from the default generator, in one process too (PaddleNLP's set_seed
    adds "global_seed" and "local_seed"). On a GPU paddle.seed, which is called here for each, also seeds the CPU's
    default generator: seed the default ones afterwards.
    """
    states = get_rng_state_tracker().states_
    default = paddle.incubate.get_rng_state(use_index=True)
    for name, state in states.items():
        tensor = 0 if name == _SAME_ON_TENSOR_RANKS else tensor_rank
        key = [seed, step, data_rank, pipeline_rank, tensor, zlib.crc32(name.encode())]
        paddle.incubate.set_rng_state(state, use_index=True)
        paddle.seed(int(np.random.SeedSequence(key).generate_state(1)[0]) & 0x7FFFFFFF)
    paddle.incubate.set_rng_state(default, use_index=True)
