"""The parallel plan: how many ranks split what, which rank stands where, and the arithmetic of the batch.

Pure Python, so that a plan can be made and checked before Paddle's process groups exist, and on a machine without them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from oarlock.config.schema import FinetuneDataSection
from oarlock.parallel.family_rules import ModelSizes
from oarlock.parallel.plan_rules import (
    check_plan,
    cut_layers,
    degree_problems,
    option_problems,
    plan_problems,
    refuse,
)

if TYPE_CHECKING:
    from oarlock.config.schema import Config
    from oarlock.config.sections import ParallelSection

__all__ = ["AXES", "Axis", "Coordinates", "ModelSizes", "ParallelPlan", "check_plan", "make_plan"]

Axis = Literal["data", "pipeline", "sharding", "tensor"]
# TrainingArguments gives Fleet the order ["dp", "pp", "sharding", "sep", "mp"] (hybrid_parallel_topo_order "pp_first");
# the last axis varies fastest from rank to rank.
AXES: tuple[Axis, ...] = ("data", "pipeline", "sharding", "tensor")


class Coordinates(NamedTuple):
    """Where a rank stands; in the order of AXES."""

    data: int
    pipeline: int
    sharding: int
    tensor: int


@dataclass(frozen=True)
class ParallelPlan:
    """Who does what.

    Attributes:
        world_size: ranks; the product of the four degrees.
        data: copies of the model whose gradients are averaged.
        sharding: ranks that share one copy of the states; they see different data too.
        stage: what they share: optimizer states (1), gradients too (2), weights too (3); 0 without sharding.
        tensor: ranks that split each layer.
        pipeline: stages that split the layers.
        virtual_pipeline: chunks of layers per stage (interleaved schedule).
        sequence_parallel: tensor ranks split the sequence outside the matrix products.
        micro_batches: per step (gradient accumulation steps).
        micro_batch_size: samples of one forward pass.
        length_multiple: what the padded length of a batch must be divisible by; under sequence parallel the one length
            there is.
    """

    world_size: int = 1
    data: int = 1
    sharding: int = 1
    stage: int = 0
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    sequence_parallel: bool = False
    micro_batches: int = 1
    micro_batch_size: int = 1
    length_multiple: int = 1

    def __post_init__(self) -> None:
        counts = (*self.shape, self.virtual_pipeline, self.micro_batches, self.micro_batch_size, self.length_multiple)
        if min(counts) < 1:
            raise ValueError(f"degrees and batch sizes must be at least 1: {self}")
        if math.prod(self.shape) != self.world_size:
            raise ValueError(f"the degrees multiply to {math.prod(self.shape)}, not to {self.world_size} ranks")
        if self.stage not in range(4) or (self.stage > 0) != (self.sharding > 1):
            raise ValueError(f"sharding {self.sharding} can't be of stage {self.stage}")

    @property
    def shape(self) -> Coordinates:
        """The degree of each axis."""
        return Coordinates(self.data, self.pipeline, self.sharding, self.tensor)

    # the batch

    @property
    def replicas(self) -> int:
        """Ranks (or groups of tensor x pipeline ranks) that see different data."""
        return self.data * self.sharding

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step."""
        return self.micro_batch_size * self.micro_batches * self.replicas

    def tokens_per_step(self, seq_length: int) -> int:
        """Tokens of an optimizer step, all sequences full."""
        return self.global_batch * seq_length

    @property
    def bubble(self) -> float:
        """Share of a step that a pipeline stage waits, (p - 1) / (m v + p - 1): arXiv 2104.04473, section 2.2."""
        waiting = self.pipeline - 1
        return waiting / (self.micro_batches * self.virtual_pipeline + waiting)

    # the ranks

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank stands, as paddle.distributed.fleet.CommunicateTopology has it."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not among {self.world_size} ranks")
        rest, tensor = divmod(rank, self.tensor)
        rest, sharding = divmod(rest, self.sharding)
        data, pipeline = divmod(rest, self.pipeline)
        return Coordinates(data, pipeline, sharding, tensor)

    def rank(self, at: Coordinates) -> int:
        """The rank that stands there; the inverse of coordinates()."""
        number = 0
        for position, degree in zip(at, self.shape, strict=True):
            number = number * degree + position
        return number

    def dataset_rank(self, rank: int) -> int:
        """Which of the replicas' samples a rank reads, as TrainingArguments.dataset_rank."""
        at = self.coordinates(rank)
        return at.data * self.sharding + at.sharding

    def groups(self, axis: Axis) -> list[list[int]]:
        """The ranks that talk to each other along an axis, in the order of CommunicateTopology.get_comm_list."""
        degrees = self.shape._asdict()
        others = self.shape._replace(**{axis: 1})
        return [
            [self.rank(Coordinates(*fixed)._replace(**{axis: i})) for i in range(degrees[axis])]
            for fixed in itertools.product(*map(range, others))
        ]

    def layers(self, stage: int, num_layers: int) -> list[range]:
        """The decoder layers of a pipeline stage, one range for each of its chunks.

        The embedding is in the first chunk of the first stage, norm and output layer in the last chunk of the last.
        """
        return cut_layers(num_layers, self.pipeline, self.virtual_pipeline)[stage :: self.pipeline]

    # words

    def describe(self) -> str:
        """One line: "8 ranks = data 2 x tensor 4; micro-batch 1 x 4 micro-batches; global batch 8"."""
        details = {
            "sharding": f" (stage {self.stage})",
            "tensor": " (sequence parallel)" if self.sequence_parallel else "",
            "pipeline": f" ({self.virtual_pipeline} chunks a stage)" if self.virtual_pipeline > 1 else "",
        }
        named = [(axis, getattr(self, axis)) for axis in ("data", "sharding", "tensor", "pipeline")]
        degrees = " x ".join(f"{axis} {degree}{details.get(axis, '')}" for axis, degree in named if degree > 1)
        ranks = _count(self.world_size, "rank") + (f" = {degrees}" if degrees else "")
        steps = f"micro-batch {self.micro_batch_size} x {_count(self.micro_batches, 'micro-batch', 'es')}"
        return f"{ranks}; {steps}; global batch {self.global_batch:,}"

    def rank_table(self, num_layers: int | None = None) -> list[tuple[str, ...]]:
        """Rows of words for printing, the headings first; with num_layers also the decoder layers of each rank."""
        head = ("rank", *AXES, "dataset rank")
        rows: list[tuple[str, ...]] = [head if num_layers is None else (*head, "layers")]
        for rank in range(self.world_size):
            at = self.coordinates(rank)
            row = (str(rank), *map(str, at), str(self.dataset_rank(rank)))
            rows.append(row if num_layers is None else (*row, _spans(self.layers(at.pipeline, num_layers))))
        return rows


def _spans(chunks: list[range]) -> str:
    """ "0-3, 8-11", both ends included."""
    words = [f"{c.start}-{c.stop - 1}" if len(c) > 1 else str(c.start) for c in chunks if c]
    return ", ".join(words) or "none"


def _count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def make_plan(config: Config, world_size: int) -> tuple[ParallelPlan, list[str]]:
    """Lay a configuration over a number of ranks.

    -1 means 1 for tensor and pipeline; for sharding, all that these two leave where --sharding is given. Data is the
    rest. On one rank the degrees are set aside, since published commands without a launcher must run.

    Returns:
        The plan, and what must be said at the start: what was asked for and is not in effect, or costs more than it
        seems to.

    Raises:
        ConfigError: with every problem that can be seen without the model.
    """
    parallel, batch = config.parallel, config.batch
    micro_batches, micro_batch_size = batch.gradient_accumulation_steps, batch.per_device_train_batch_size
    if world_size == 1:
        return ParallelPlan(micro_batches=micro_batches, micro_batch_size=micro_batch_size), _unused(parallel)
    tensor, pipeline = max(1, parallel.tensor_parallel_degree), max(1, parallel.pipeline_parallel_degree)
    refuse(degree_problems(parallel, tensor, pipeline, world_size), world_size)
    left = world_size // (tensor * pipeline)
    sharding = 1
    if parallel.sharding:
        sharding = left if parallel.sharding_parallel_degree == -1 else parallel.sharding_parallel_degree
    plan = ParallelPlan(
        world_size=world_size,
        data=left // sharding,
        sharding=sharding,
        stage=int(parallel.sharding[-1]) if sharding > 1 else 0,
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=parallel.virtual_pp_degree,
        sequence_parallel=parallel.sequence_parallel,
        micro_batches=micro_batches,
        micro_batch_size=micro_batch_size,
        length_multiple=text_length(config) if parallel.sequence_parallel else 1,
    )
    refuse([*plan_problems(plan), *option_problems(config, plan)], world_size)
    return plan, _notes(parallel, plan)


def text_length(config: Config) -> int:
    """The longest text, in tokens; the padded length of every batch under sequence parallel."""
    data = config.data
    if not isinstance(data, FinetuneDataSection):
        return data.max_seq_length
    return max(data.src_length + data.tgt_length, (data.packing_length or 0) if data.packing else 0)


def sequence_length(config: Config) -> int:
    """The length that models are built for: the longest text, after the virtual tokens of p-tuning.

    Sequence parallel makes it the only one: LlamaAttention and the other classes put gathered tokens back into rows of
    config.seq_length, and would cut batches of any other length in the wrong places.
    """
    method = getattr(config, "method", None)
    return text_length(config) + (method.num_virtual_tokens if method is not None and method.p_tuning else 0)


def _unused(parallel: ParallelSection) -> list[str]:
    """One process has nobody to share with: PaddleNLP drops these settings without a word."""
    degrees = {
        "--tensor_parallel_degree": parallel.tensor_parallel_degree,
        "--pipeline_parallel_degree": parallel.pipeline_parallel_degree,
        "--virtual_pp_degree": parallel.virtual_pp_degree,
        "--sharding_parallel_degree": parallel.sharding_parallel_degree,
    }
    unused = [f"{flag} {value}" for flag, value in degrees.items() if value > 1]
    unused += ["--sequence_parallel"] if parallel.sequence_parallel else []
    unused += [f"--sharding {parallel.sharding}"] if parallel.sharding else []
    if not unused:
        return []
    return [
        f"one process: {', '.join(unused)} not in effect (start with `python -m paddle.distributed.launch` on as many "
        "devices as the degrees multiply to)"
    ]


def _notes(parallel: ParallelSection, plan: ParallelPlan) -> list[str]:
    notes = []
    if parallel.sharding and not plan.stage:  # TrainingArguments clears --sharding
        why = f"with --sharding_parallel_degree 1 nothing is shared (data {plan.data})"
        if plan.data == 1:
            users = [axis for axis in ("tensor", "pipeline") if getattr(plan, axis) > 1]
            verb = "use" if len(users) > 1 else "uses"
            why = f"{' x '.join(users)} {verb} all {plan.world_size} ranks, so nothing is left to shard over"
        notes.append(f"--sharding {parallel.sharding}: {why}; not in effect")
    if plan.stage == 2 and plan.pipeline > 1:
        notes.append(
            "--sharding stage2 with a pipeline, which PaddleNLP does not have: Fleet shards the optimizer states, "
            "Oarlock the gradients"
        )
    if plan.micro_batches < plan.pipeline:
        more = replace(plan, micro_batches=4 * plan.pipeline)
        notes.append(
            f"--gradient_accumulation_steps {plan.micro_batches} is below the {plan.pipeline} pipeline stages: each "
            f"waits {plan.bubble:.0%} of a step; with {more.micro_batches} it would be {more.bubble:.0%}"
        )
    return notes
