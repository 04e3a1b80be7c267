"""Parallel degrees that follow from the number of ranks, for the 4D job (data, sharding, tensor, pipeline)."""

from __future__ import annotations

from dataclasses import dataclass

from oarlock.errors import ConfigError
from oarlock.launch.options import LaunchOptions


@dataclass(frozen=True)
class Degrees:
    """All ranks = data x sharding x tensor x pipeline."""

    data: int
    sharding: int
    tensor: int
    pipeline: int
    stage: str

    def to_flags(self) -> list[str]:
        """Flags for the training script. It derives the data degree from the others."""
        flags = ["--tensor_parallel_degree", str(self.tensor), "--pipeline_parallel_degree", str(self.pipeline)]
        flags += ["--sharding", self.stage]
        if self.data * self.sharding > 1:
            flags += ["--sharding_parallel_degree", str(self.sharding)]
        return flags

    def __str__(self) -> str:
        return (
            f"data {self.data} x sharding {self.sharding} ({self.stage}) x tensor {self.tensor} x "
            f"pipeline {self.pipeline}"
        )


def choose_degrees(options: LaunchOptions, ranks: int) -> Degrees | None:
    """Choose the degrees for this number of ranks; None without --tp.

    Raises:
        ConfigError: the degrees do not divide the ranks.
    """
    if options.tp is None:
        return None
    tensor, pipeline = options.tp, options.pp
    left, rest = divmod(ranks, tensor * pipeline)
    if rest or not left:
        raise ConfigError(
            f"{ranks} ranks ({options.nnodes} node(s) x {ranks // options.nnodes}) can't be divided by tensor {tensor} "
            f"x pipeline {pipeline} = {tensor * pipeline}: change GPUS, TP or PP (--gpus, --tp, --pp)"
        )
    sharding = options.sharding_degree or (2 if left % 2 == 0 else left)
    if left % sharding:
        raise ConfigError(
            f"a sharding degree of {sharding} does not divide the {left} rank(s) that tensor {tensor} x pipeline "
            f"{pipeline} leaves of {ranks}: change SHARDING_DEGREE (--sharding_degree)"
        )
    stage = options.sharding or ("stage1" if left == 1 else "stage2")
    return Degrees(left // sharding, sharding, tensor, pipeline, stage)
