"""Progress of a run, and when to log, evaluate and save.

What is due after a step depends on samples and steps alone (the Trainer's strategies count steps of one plan).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oarlock.config.run_config import RunConfig
    from oarlock.train.checkpoint.manifest import Manifest


@dataclass
class Progress:
    """Progress of a run, all of which is in the manifest.

    Attributes:
        samples: consumed over all ranks.
        window_loss, window_steps: step losses since the last log row.
        owes_evaluation: SIGTERM interrupted the evaluation of this step; the resumed run starts with it.
    """

    samples: int = 0
    window_loss: float = 0.0
    window_steps: int = 0
    owes_evaluation: bool = False

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> Progress:
        """Progress of the run that wrote a checkpoint."""
        loss, steps = manifest.loss_window
        return cls(manifest.samples, math.nan if loss is None else loss, steps, manifest.owes_evaluation)


@dataclass(frozen=True)
class DueActions:
    """Actions after a step.

    Attributes:
        owed: an evaluation is due, but the run is stopping.
    """

    log: bool
    evaluate: bool
    save: bool
    owed: bool = False

    def apply(self, control: Any) -> None:
        """Set the flags of PaddleNLP's TrainerControl."""
        control.should_log, control.should_evaluate, control.should_save = self.log, self.evaluate, self.save


def choose_due_actions(
    config: RunConfig, step: int, last_step: int, samples_before: int, samples: int, epoch_size: int, stopping: bool
) -> DueActions:
    """Decide what to do after a step.

    Args:
        step: the step that is done.
        last_step: the run's last step.
        samples_before, samples: consumed before and after the step.
        epoch_size: samples of an epoch.
        stopping: SIGTERM came: save, but do nothing else that takes long.
    """
    last = step >= last_step
    epoch_over = samples // epoch_size > samples_before // epoch_size
    eval_steps = config.evaluation.eval_steps
    evaluation_due = config.evaluation.do_eval and (
        last or (epoch_over if eval_steps is None else step % eval_steps == 0)
    )
    saving = config.checkpoint
    save_due = {
        "steps": step % saving.save_steps == 0,
        "epoch": epoch_over,
        "no": False,
    }[saving.save_strategy]
    return DueActions(
        log=last or step % config.logging.logging_steps == 0,
        evaluate=evaluation_due and not stopping,
        save=stopping or save_due or (last and saving.save_strategy != "no"),
        owed=evaluation_due and stopping,
    )
