"""What pretraining and fine-tuning have in common: the sections of a configuration, and the questions asked of both."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from oarlock.config.method import MethodSection
from oarlock.config.shared import (
    BatchSection,
    CheckpointSection,
    DataSection,
    EvaluationSection,
    KernelSection,
    LoggingSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    PrecisionSection,
    RuntimeSection,
    ScheduleSection,
)


@dataclass(frozen=True)
class RunConfig(abc.ABC):
    """The configuration of a run.

    Attributes:
        kind: what the run does.
        varies_in_length: batches are padded to their own longest example, so their shapes differ.
    """

    kind: ClassVar[Literal["pretrain", "finetune"]]
    varies_in_length: ClassVar[bool]

    model: ModelSection
    data: DataSection
    batch: BatchSection
    schedule: ScheduleSection
    optimizer: OptimizerSection
    evaluation: EvaluationSection
    checkpoint: CheckpointSection
    logging: LoggingSection
    precision: PrecisionSection
    kernels: KernelSection
    parallel: ParallelSection
    runtime: RuntimeSection

    @property
    def is_finetuning(self) -> bool:
        return self.kind == "finetune"

    @property
    def method_section(self) -> MethodSection | None:
        """The fine-tuning method; None in pretraining, which trains all weights."""
        return None

    @property
    def generates_answers(self) -> bool:
        """Whether evaluations generate answers and report metrics of them."""
        return False

    @property
    def sequence_length(self) -> int:
        """The sequence length that models are built for, in tokens.

        Under sequence parallelism it is the only one. LlamaAttention and the other classes reshape the gathered tokens
        to rows of config.seq_length, and would cut batches of any other length in the wrong places.
        """
        return self.data.row_length

    @abc.abstractmethod
    def find_own_problems(self) -> Iterator[str]:
        """Conflicts among options that the other kind of run does not have."""
