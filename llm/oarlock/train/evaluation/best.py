"""Which evaluation was the best so far, and when to stop waiting for a better one.

The meaning is that of PaddleNLP's EarlyStoppingCallback and load_best_model_at_end; the state is in every checkpoint's
manifest, so that a resumed run decides as the uninterrupted one.
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
from oarlock.train.checkpoint.manifest import MANIFEST, checkpoint_folder, verify
from oarlock.train.checkpoint.manifest_fields import BestState

if TYPE_CHECKING:
    from oarlock.config.run_config import RunConfig
    from oarlock.train.checkpoint.resume import ResumePoint

logger = get_logger(__name__)


@dataclass
class BestEvaluation:
    """The best evaluation, and how many came since.

    Attributes:
        metric: what evaluations are compared by, for example "eval_loss".
        keep: its checkpoint is to be kept for the end (--load_best_model_at_end).
        patience: evaluations without an improvement after which training stops; None: never.
        threshold: what the metric must change by, from the best, to be an improvement for `patience`.
        value, step: of the best so far; None before the first.
        folder: its checkpoint, where it is kept.
        evaluations_since: without an improvement, in a row.
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
    def of(cls, config: RunConfig, resume: ResumePoint | None) -> BestEvaluation:
        """At the start of a run, or where the checkpoint it goes on from says."""
        evaluation = config.evaluation
        best = cls(
            best_metric(config),
            config.checkpoint.load_best_model_at_end,
            evaluation.early_stopping_patience,
            evaluation.early_stopping_threshold,
        )
        if resume is not None and resume.manifest.best:
            best._take(resume.manifest.best, resume.folder.parent)
        return best

    def _take(self, state: BestState, checkpoints: Path) -> None:
        folder = checkpoints / state["name"] if state["name"] else None
        if state["metric"] != self.metric:
            logger.info(f"the best model was chosen by {state['metric']}, now by {self.metric}: evaluations count anew")
        elif self.keep and state["value"] is not None and (folder is None or not (folder / MANIFEST).is_file()):
            where = f"{folder} is not there" if folder else "its weights were not kept"
            logger.info(f"the best evaluation was that of step {state['step']}, but {where}: evaluations count anew")
        else:
            self.value, self.step, self.folder = state["value"], state["step"], folder
            self.evaluations_since = state["evaluations_since"]

    def state(self) -> BestState | None:
        """For the manifest; None before the first evaluation."""
        if self.value is None and not self.evaluations_since:
            return None
        return {
            "metric": self.metric,
            "value": self.value,
            "step": self.step,
            "name": self.folder.name if self.folder else None,
            "evaluations_since": self.evaluations_since,
        }

    def see(self, value: float, step: int, checkpoint: Path) -> bool:
        """Take an evaluation into account; returns whether it is the best so far.

        A better value is the new best however small the difference is; `threshold` decides only whether patience
        begins anew. Values that are not finite are never better.

        Args:
            checkpoint: where the weights of this step are kept, if they are.
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
        """Whether patience is at its end."""
        return self.patience is not None and self.evaluations_since >= self.patience

    def describe(self) -> str:
        """In words, for the log."""
        if self.value is None:
            return f"no evaluation gave a finite {self.metric}"
        return f"the best {self.metric} is {self.value:.6g}, of step {self.step}"


def judge_evaluation(
    best: BestEvaluation, metrics: Mapping[str, float], state: Any, control: Any, config: RunConfig
) -> None:
    """Compare an evaluation with the best so far, on all ranks; ask for a checkpoint or an early stop.

    Args:
        state, control: PaddleNLP's TrainerState and TrainerControl.
    """
    step = state.global_step
    value = all_gather_objects(metrics[best.metric])[0]  # rank 0's: a last bit that differs must not part the ranks
    checkpoint = checkpoint_folder(config.checkpoint.output_dir, step)
    if best.see(value, step, checkpoint) and best.keep:
        control.should_save = True
    if best.exhausted and step < state.max_steps:
        logger.info(f"stopping early at step {step}: {best.describe()}; {best.evaluations_since} evaluation(s) since")
        control.should_training_stop = True
        control.should_save = control.should_save or config.checkpoint.save_strategy != "no"


def load_best_weights(best: BestEvaluation, last_step: int, shards: LocalShards) -> None:
    """After training, replace the last weights by those of the best evaluation, under any plan.

    Raises:
        CheckpointError: when its checkpoint is not complete.
    """
    if best.folder is None or best.step == last_step:
        logger.info(f"{best.describe()}: the last weights are the final model's")
        return
    folder = best.folder

    def check() -> None:
        verify(folder)

    try:
        run_on_all_ranks(check, first_rank_only=True)
    except CheckpointError as error:
        raise CheckpointError(
            f"--load_best_model_at_end: {best.describe()}, but {error}. To have the last weights as the final "
            "model, start the same command again without this flag"
        ) from error
    reload_weights(shards, folder)
    logger.info(f"{best.describe()}: {folder.name} is the final model")
