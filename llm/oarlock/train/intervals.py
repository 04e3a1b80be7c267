"""What is due after a step, decided from samples and steps alone (the Trainer's strategies count steps of one plan)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oarlock.config.run_config import RunConfig
    from oarlock.train.checkpoint.manifest import Manifest


@dataclass
class Progress:
    """Where a run stands; all of it is in the manifest.

    Attributes:
        samples: consumed over all ranks.
        window_loss, window_steps: step losses since the last log row.
        owes_evaluation: the evaluation of this step was given up when SIGTERM came; the resumed run makes it up.
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

    def add_step(self, loss: float, samples: int) -> None:
        """Count a step that is done."""
        self.samples += samples
        self.window_loss += loss
        self.window_steps += 1


@dataclass(frozen=True)
class Due:
    """What to do now.

    Attributes:
        owed: an evaluation is due, but there is no time for it.
    """

    log: bool
    evaluate: bool
    save: bool
    owed: bool = False

    def apply(self, control: Any) -> None:
        """Set the flags of PaddleNLP's TrainerControl."""
        control.should_log, control.should_evaluate, control.should_save = self.log, self.evaluate, self.save


def what_is_due(
    config: RunConfig, step: int, last_step: int, samples_before: int, samples: int, epoch_size: int, stopping: bool
) -> Due:
    """Decide.

    Args:
        step: just done; last_step ends the run.
        samples_before, samples: consumed before and after it.
        epoch_size: samples of an epoch.
        stopping: SIGTERM came: save, and nothing else that takes long.
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
    return Due(
        log=last or step % config.logging.logging_steps == 0,
        evaluate=evaluation_due and not stopping,
        save=stopping or save_due or (last and saving.save_strategy != "no"),
        owed=evaluation_due and stopping,
    )
