"""The parallel plan: the degrees of data, sharding, pipeline and tensor parallelism, and what follows from them.

Pure Python, so a plan can be made and checked before Paddle's process groups exist, and on machines without Paddle.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Axis = Literal["data", "pipeline", "sharding", "tensor"]
# TrainingArguments gives Fleet the order ["dp", "pp", "sharding", "sep", "mp"] (hybrid_parallel_topo_order "pp_first");
# the last axis varies fastest from rank to rank.
AXES: tuple[Axis, ...] = ("data", "pipeline", "sharding", "tensor")

# What the ranks of a sharding group divide among themselves, and who does it:
#   optimizer         optimizer states, by Fleet's DygraphShardingOptimizer (ZeRO stage 1)
#   gradients_hooked  gradients too, under a pipeline: stage 1 by Fleet, gradients by parallel.sharded_gradients
#   gradients         gradients too, by Paddle's GroupShardedStage2 (ZeRO stage 2)
#   parameters        parameters too, by Paddle's GroupShardedStage3 (ZeRO stage 3)
ShardingStrategy = Literal["none", "optimizer", "gradients_hooked", "gradients", "parameters"]


class Coordinates(NamedTuple):
    """The position of a rank along each axis, in the order of AXES."""

    data: int
    pipeline: int
    sharding: int
    tensor: int


@dataclass(frozen=True)
class ParallelPlan:
    """The division of a training step among ranks.

    Attributes:
        world_size: number of ranks, the product of the four degrees.
        data: number of model replicas whose gradients are averaged.
        sharding: ranks that share one copy of the training state. They read different data too.
        stage: what is sharded: optimizer states (1), gradients too (2), parameters too (3); 0 without sharding.
        tensor: ranks that split each layer.
        pipeline: stages that split the stack of layers.
        expert: ranks that divide the experts of a layer. They are consecutive replicas, so this is no further axis.
        virtual_pipeline: chunks of layers per stage (interleaved schedule).
        sequence_parallel: the tensor ranks split the sequence outside the matrix products.
        micro_batches: micro-batches per step (gradient accumulation steps).
        micro_batch_size: samples per micro-batch.
        length_multiple: the padded length of every batch is a multiple of this. Under sequence parallelism it is the
            only length.
    """

    world_size: int = 1
    data: int = 1
    sharding: int = 1
    stage: int = 0
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    virtual_pipeline: int = 1
    sequence_parallel: bool = False
    micro_batches: int = 1
    micro_batch_size: int = 1
    length_multiple: int = 1

    def __post_init__(self) -> None:
        counts = (
            *self.shape,
            self.expert,
            self.virtual_pipeline,
            self.micro_batches,
            self.micro_batch_size,
            self.length_multiple,
        )
        if min(counts) < 1:
            raise ValueError(f"degrees and batch sizes must be at least 1: {self}")
        if math.prod(self.shape) != self.world_size:
            raise ValueError(f"the degrees multiply to {math.prod(self.shape)}, not to {self.world_size} ranks")
        if self.stage not in range(4) or (self.stage > 0) != (self.sharding > 1):
            raise ValueError(f"sharding {self.sharding} can't be of stage {self.stage}")
        if self.replicas % self.expert:
            raise ValueError(f"experts over {self.expert} ranks don't divide {self.replicas} replicas")
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence parallelism splits the sequence among tensor ranks, and there is only one")

    @property
    def shape(self) -> Coordinates:
        """The degree of each axis."""
        return Coordinates(self.data, self.pipeline, self.sharding, self.tensor)

    @property
    def sharding_strategy(self) -> ShardingStrategy:
        """The kind of sharding. PaddleNLP refuses stage 2 under a pipeline, so Oarlock does that one."""
        if self.stage == 2 and self.pipeline > 1:
            return "gradients_hooked"
        strategies: tuple[ShardingStrategy, ...] = ("none", "optimizer", "gradients", "parameters")
        return strategies[self.stage]

    # the batch

    @property
    def replicas(self) -> int:
        """Number of ranks (or groups of tensor x pipeline ranks) that read different data."""
        return self.data * self.sharding

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step."""
        return self.micro_batch_size * self.micro_batches * self.replicas

    @property
    def bubble(self) -> float:
        """Fraction of a step that a pipeline stage is idle, (p - 1) / (m v + p - 1): arXiv 2104.04473, section 2.2."""
        waiting = self.pipeline - 1
        return waiting / (self.micro_batches * self.virtual_pipeline + waiting)

    # the ranks

    def coordinates(self, rank: int) -> Coordinates:
        """The position of a rank, the same as in paddle.distributed.fleet.CommunicateTopology."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not among {self.world_size} ranks")
        rest, tensor = divmod(rank, self.tensor)
        rest, sharding = divmod(rest, self.sharding)
        data, pipeline = divmod(rest, self.pipeline)
        return Coordinates(data, pipeline, sharding, tensor)

    def rank(self, at: Coordinates) -> int:
        """The rank at a position; the inverse of coordinates()."""
        number = 0
        for position, degree in zip(at, self.shape, strict=True):
            number = number * degree + position
        return number

    def dataset_rank(self, rank: int) -> int:
        """Index of the data shard that a rank reads, the same as TrainingArguments.dataset_rank."""
        at = self.coordinates(rank)
        return at.data * self.sharding + at.sharding

    def expert_rank(self, rank: int) -> int:
        """The index of the experts' shard that a rank holds."""
        return self.dataset_rank(rank) % self.expert

    def groups(self, axis: Axis) -> list[list[int]]:
        """The communication groups of an axis, in the order of CommunicateTopology.get_comm_list."""
        degrees = self.shape._asdict()
        others = self.shape._replace(**{axis: 1})
        return [
            [self.rank(Coordinates(*fixed)._replace(**{axis: i})) for i in range(degrees[axis])]
            for fixed in itertools.product(*map(range, others))
        ]

    def expert_groups(self) -> list[list[int]]:
        """The groups of ranks that divide the experts of their layers among them."""
        return [
            ranks[begin : begin + self.expert]
            for ranks in self._replica_groups()
            for begin in range(0, self.replicas, self.expert)
        ]

    def expert_copies(self) -> list[list[int]]:
        """The groups of ranks that hold the same experts."""
        return [ranks[first :: self.expert] for ranks in self._replica_groups() for first in range(self.expert)]

    def _replica_groups(self) -> list[list[int]]:
        """The ranks of all replicas, for each pair of a pipeline stage and a tensor rank."""
        return [
            [
                self.rank(Coordinates(data, stage, sharding, tensor))
                for data, sharding in itertools.product(range(self.data), range(self.sharding))
            ]
            for stage, tensor in itertools.product(range(self.pipeline), range(self.tensor))
        ]

    def layers(self, stage: int, num_layers: int) -> list[range]:
        """The decoder layers of a pipeline stage, one range per chunk.

        The first chunk of the first stage also has the embedding; the last chunk of the last stage has the final norm
        and the output layer.
        """
        return cut_layers(num_layers, self.pipeline, self.virtual_pipeline)[stage :: self.pipeline]

    # text

    def describe(self) -> str:
        """One line, such as "8 ranks = data 2 x tensor 4; micro-batch 1 x 4 micro-batches; global batch 8"."""
        details = {
            "sharding": f" (stage {self.stage})",
            "tensor": " (sequence parallel)" if self.sequence_parallel else "",
            "pipeline": f" ({self.virtual_pipeline} chunks a stage)" if self.virtual_pipeline > 1 else "",
        }
        named = [(axis, getattr(self, axis)) for axis in ("data", "sharding", "tensor", "pipeline")]
        degrees = " x ".join(f"{axis} {degree}{details.get(axis, '')}" for axis, degree in named if degree > 1)
        ranks = _count(self.world_size, "rank") + (f" = {degrees}" if degrees else "")
        ranks += f"; experts over {self.expert} ranks" if self.expert > 1 else ""
        steps = f"micro-batch {self.micro_batch_size} x {_count(self.micro_batches, 'micro-batch', 'es')}"
        return f"{ranks}; {steps}; global batch {self.global_batch:,}"


def cut_layers(num_layers: int, pipeline: int, virtual: int = 1) -> list[range]:
    """The decoder layers of every chunk of a pipeline; entry i is chunk i // pipeline of stage i % pipeline.

    PaddleNLP's pipeline classes cut by "layer:...DecoderLayer" if the stages divide the layers, and otherwise
    "uniform": SegmentLayers.do_segment then cuts all items (embedding, layers, norm, output layer) into nearly equal
    chunks.

    Raises:
        ValueError: Paddle can't cut these layers into these chunks.
    """
    chunks = pipeline * virtual
    if num_layers % chunks == 0:
        size = num_layers // chunks
        return [range(i * size, (i + 1) * size) for i in range(chunks)]
    # PipelineLayer: "seg_method should be start with layer: for interleave scheduler"; SegmentLayers: "number of
    # layers should be divided by part number", "layer number should be greater than number of segments".
    items = num_layers + 3
    if virtual > 1 or items < pipeline:
        raise ValueError(f"{num_layers} layers can't be cut into {chunks} chunks")
    size, extra = divmod(items, pipeline)
    sizes = [size + (i > pipeline - extra) for i in range(1, pipeline)]
    bounds = [0, *itertools.accumulate(sizes), items]
    firsts = [min(max(bound - 1, 0), num_layers) for bound in bounds]  # item 0 is the embedding
    return [range(start, stop) for start, stop in itertools.pairwise(firsts)]


def _count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else ending}"
