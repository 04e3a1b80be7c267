"""Types of the fields of a checkpoint's manifest and of trainer_state.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Le, Len
from typing_extensions import TypedDict

Count = Annotated[int, Ge(0), Le(1 << 53)]  # beyond any run, and far from overflowing 64 bits


class FileEntry(TypedDict):
    """Size and checksum of a file."""

    bytes: Count
    sha256: Annotated[str, Len(64, 64)]


class SchedulerState(TypedDict):
    """State of the learning rate schedule."""

    last_epoch: Count
    last_lr: float


class ScalerState(TypedDict):
    """State of fp16 loss scaling (GradScaler)."""

    scale: Annotated[list[float], Len(1, 1)]
    incr_ratio: float
    decr_ratio: float
    incr_every_n_steps: Count
    decr_every_n_nan_or_inf: Count
    incr_count: Count
    decr_count: Count
    use_dynamic_loss_scaling: bool


class BestState(TypedDict):
    """The best evaluation (see oarlock.train.evaluation.best)."""

    metric: str
    value: float | None
    step: Count
    name: str | None
    evaluations_since: Count


class BaseState(TypedDict):
    """The frozen model that an adapter was trained on."""

    name: str
    fingerprint: str


@dataclass
class TrainerStateFile:
    """The fields of PaddleNLP's TrainerState, which the Trainer reads on resume."""

    global_step: Count
    epoch: float | None = None
    consumed_samples: Count = 0
    max_steps: Count = 0
    num_train_epochs: float = 0
    total_flos: float = 0
    log_history: Annotated[list[dict[str, float]], Len(0, 0)] = field(default_factory=list)
    best_metric: None = None
    best_model_checkpoint: None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    trial_name: None = None
    trial_params: None = None
