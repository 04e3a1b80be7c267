"""The best evaluation so far, its checkpoint, and early stopping.

The semantics are those of PaddleNLP's EarlyStoppingCallback and load_best_model_at_end. The state is in the manifest of
every checkpoint, so a resumed run decides as an uninterrupted one would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarlock.config.metric_names import METRICS, best_metric
from oarlock.environment.console import get_logger
from oarlock.errors import CheckpointError
from oarlock.parallel.object_collectives import all_gather_objects, run_on_all_ranks
from oarlock.train.checkpoint.load_shards import reload_weights
from oarlock.train.checkpoint.local_shards import LocalShards
from oarlock.train.checkpoint.manifest import MANIFEST, make_checkpoint_path, verify
from oarlock.train.checkpoint.manifest_fields import BestState

if TYPE_CHECKING:
    from oarlock.config.run_config import RunConfig
    from oarlock.train.checkpoint.resume import ResumePoint

logger = get_logger(__name__)


@dataclass
class BestEvaluation:
    """The best evaluation, and the number of evaluations since.

    Attributes:
        metric: name of the metric that is compared, for example "eval_loss".
        keep: keep its checkpoint until the end of the run (--load_best_model_at_end).
        patience: number of evaluations without improvement after which training stops; None for never.
        threshold: smallest change of the metric that `patience` counts as an improvement.
        value, step: metric and step of the best evaluation; the value is None before the first one.
        folder: its checkpoint, if it is kept.
        evaluations_since: consecutive evaluations without improvement.
    """

    metric: str
    keep: bool
    patience: int | None = None
    threshold: float = 0.0
    value: float | None = None
    step: int = 0
    folder: Path | None = None
    evaluations_since: int = 0

    @classmethod
    def from_config(cls, config: RunConfig, resume: ResumePoint | None) -> BestEvaluation:
        """The state at the start of a run, or at the checkpoint that it resumes from."""
        evaluation = config.evaluation
        best = cls(
            best_metric(config),
            config.checkpoint.load_best_model_at_end,
            evaluation.early_stopping_patience,
            evaluation.early_stopping_threshold,
        )
        state = resume.manifest.best if resume is not None else None
        if resume is None or not state:
            return best
        folder = resume.folder.parent / state["name"] if state["name"] else None
        if state["metric"] != best.metric:
            logger.info(f"the metric changed from {state['metric']} to {best.metric}: earlier evaluations are ignored")
        elif best.keep and state["value"] is not None and (folder is None or not (folder / MANIFEST).is_file()):
            where = f"{folder} is missing" if folder else "its weights were not kept"
            logger.info(f"the best evaluation was at step {state['step']}, but {where}: it is ignored")
        else:
            best.value, best.step, best.folder = state["value"], state["step"], folder
            best.evaluations_since = state["evaluations_since"]
        return best

    def state(self) -> BestState | None:
        """The state for the manifest; None before the first evaluation."""
        if self.value is None and not self.evaluations_since:
            return None
        return {
            "metric": self.metric,
            "value": self.value,
            "step": self.step,
            "name": self.folder.name if self.folder else None,
            "evaluations_since": self.evaluations_since,
        }

    def observe(self, value: float, step: int, checkpoint: Path) -> bool:
        """Record an evaluation; returns whether it is the best so far.

        Any better value becomes the best, however small the difference; `threshold` only decides whether patience
        starts over. Values that are not finite are never better.

        Args:
            checkpoint: the folder with the weights of this step, if they are kept.
        """
        sign = 1 if METRICS[self.metric].greater_is_better else -1
        better = math.isfinite(value) and (self.value is None or sign * (value - self.value) > 0)
        improved = better and (self.value is None or abs(value - self.value) > self.threshold)
        self.evaluations_since = 0 if improved else self.evaluations_since + 1
        if better:
            self.value, self.step, self.folder = value, step, checkpoint if self.keep else None
        return better

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.evaluations_since >= self.patience

    def describe(self) -> str:
        """Describe the best evaluation, for the log."""
        if self.value is None:
            return f"no evaluation had a finite {self.metric}"
        return f"the best {self.metric} is {self.value:.6g} at step {self.step}"


def judge_evaluation(
    best: BestEvaluation, metrics: Mapping[str, float], state: Any, control: Any, config: RunConfig
) -> None:
    """Compare an evaluation with the best so far, on all ranks; request a checkpoint or an early stop if due.

    Args:
        state, control: PaddleNLP's TrainerState and TrainerControl.
    """
    step = state.global_step
    value = all_gather_objects(metrics[best.metric])[0]  # rank 0's value, so that all ranks decide alike
    checkpoint = make_checkpoint_path(config.checkpoint.output_dir, step)
    if best.observe(value, step, checkpoint) and best.keep:
        control.should_save = True
    if best.exhausted and step < state.max_steps:
        count = best.evaluations_since
        logger.info(f"stopping early at step {step}: {best.describe()}; {count} evaluation(s) without improvement")
        control.should_training_stop = True
        control.should_save = control.should_save or config.checkpoint.save_strategy != "no"


def load_best_weights(best: BestEvaluation, last_step: int, shards: LocalShards) -> None:
    """After training, replace the last weights with those of the best evaluation.

    Raises:
        CheckpointError: if its checkpoint is damaged.
    """
    if best.folder is None or best.step == last_step:
        logger.info(f"{best.describe()}: the final model has the last weights")
        return
    folder = best.folder

    def check() -> None:
        verify(folder)

    try:
        run_on_all_ranks(check, first_rank_only=True)
    except CheckpointError as error:
        raise CheckpointError(
            f"--load_best_model_at_end: {best.describe()}, but {error}. To save the last weights as the final model, "
            "run the same command without this flag"
        ) from error
    reload_weights(shards, folder)
    logger.info(f"{best.describe()}: {folder.name} is the final model")
