"""The PaddleNLP Trainer with checkpoints that are whole or not there, written by all ranks and read under any plan."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from paddle import nn
from paddlenlp.trainer.trainer import TRAINER_STATE_NAME

from oarlock.config.load import flatten
from oarlock.environment import matmul_library
from oarlock.environment.console import get_logger
from oarlock.environment.ranks import is_first_rank
from oarlock.errors import CheckpointError, OutputLost, StoppedWithOthers, report
from oarlock.files import write_json
from oarlock.parallel.object_collectives import run_on_all_ranks
from oarlock.peft.adapter_folder import ADAPTER_FILE, describe_adapter
from oarlock.train.checkpoint import resume as checkpoints
from oarlock.train.checkpoint.local_shards import Held, load_states, load_weights, reload_weights
from oarlock.train.checkpoint.manifest import Manifest, verify
from oarlock.train.checkpoint.manifest_fields import ScalerState
from oarlock.train.checkpoint.writer import PendingSave
from oarlock.train.trainer_data import FeedingTrainer
from oarlock.versions import package_versions
from oarlock.weights.save import save_config, save_generation, save_tokenizer
from oarlock.weights.sharded_store import PieceFolder

if TYPE_CHECKING:
    from oarlock.data.templates.chat_template import ChatTemplate
    from oarlock.parallel.plan import ParallelPlan
    from oarlock.peft.adapter_folder import Base
    from oarlock.peft.method import Method

logger = get_logger(__name__)


class CheckpointingTrainer(FeedingTrainer):
    """What a trainer saves and how it goes on; OarlockTrainer sets the attributes."""

    plan: ParallelPlan
    held: Held
    template: ChatTemplate | None
    data_fingerprint: str
    method: Method | None
    base: Base | None
    generation: Mapping[str, Any]
    lr_scheduler: Any
    control: Any
    model_wrapped: Any
    _pending_save: PendingSave | None = None

    def _save_checkpoint(self, model: nn.Layer, metrics: dict[str, float] | None = None) -> None:
        manifest = Manifest(
            step=self.state.global_step,
            samples=self.progress.samples,
            seed=self.config.runtime.seed,
            lr_scheduler=self.lr_scheduler.state_dict(),
            loss_window=(self._mean_loss(), self.progress.window_steps),
            config=flatten(self.config),
            data_fingerprint=self.data_fingerprint,
            loss_scaler=self._scaler_state(),
            base={"name": self.base.name, "fingerprint": self.base.fingerprint} if self.base is not None else None,
            best=self.best.state(),
            owes_evaluation=self.progress.owes_evaluation,
            planned_steps=self.state.max_steps,
            plan=self.plan.describe(),
            versions=package_versions(),
            products=matmul_library.in_use(),
        )
        with contextlib.suppress(
            CheckpointError, StoppedWithOthers
        ):  # told already; this save tries again, on all ranks
            self.finish_save()
        pending = checkpoints.save(self, manifest, self.config.checkpoint.async_save)
        if not self.config.checkpoint.async_save:
            self._saved(pending)
            return
        self._pending_save = pending
        pending.start(self.config.runtime.collective_timeout, lambda error: self._saved(pending, error))

    def finish_save(self) -> None:
        """Wait for a save in the background, if there is one."""
        if self._pending_save is not None:
            pending, self._pending_save = self._pending_save, None
            checkpoints.finish(pending)

    def _saved(self, pending: PendingSave, error: Exception | None = None) -> None:
        if isinstance(error, OutputLost):  # the run finds it by itself
            return
        if error is not None:
            report(CheckpointError(checkpoints.failure_text(pending.final, error)))
            return
        if is_first_rank():
            keep, best = self.config.checkpoint.save_total_limit, pending.manifest.best
            # The best that this checkpoint knows of: a newer one may still be on its way to the disk.
            try:
                checkpoints.rotate(Path(self.args.output_dir), keep, best and best["name"], pending.manifest.step)
            except OSError as problem:  # this checkpoint is there; the next save finds what is wrong
                logger.info(
                    f"an older checkpoint could not be deleted: {checkpoints.reason(problem, pending.final.parent)}"
                )
        logger.info(f"checkpoint: {pending.final} ({pending.timing})")

    def save_tokenizer_and_template(self, folder: Path) -> None:
        """The tokenizer's files and the chat template, so that the folder is a model on its own."""

        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        save_config(self.model.config, folder)
        save_generation(self.generation, folder)
        if self.method is not None and self.base is not None:
            write_json(folder / ADAPTER_FILE, describe_adapter(self.method, self.base, self.model.config.dtype))
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder, self.template)

    def _scaler_state(self) -> ScalerState | None:
        if not self.do_grad_scaling:
            return None
        state = self.scaler.state_dict()
        return cast(ScalerState, {name: np.asarray(value).tolist() for name, value in state.items()})

    # resume

    def train_or_resume(self) -> Any:
        """Train from the start, or from the resume point this trainer was made with."""
        return self.train(resume_from_checkpoint=str(self.resume.folder) if self.resume else None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str | None = None) -> None:
        if self.resume:
            with PieceFolder.open(self.resume.folder) as folder:
                load_weights(self.held, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.resume is None:
            return
        manifest = self.resume.manifest
        with PieceFolder.open(self.resume.folder) as folder:
            load_states(self.held, self.optimizer, folder, manifest.lr_scheduler)
        self.lr_scheduler.set_state_dict(manifest.lr_scheduler)
        self.lr_scheduler.step(self.lr_scheduler.last_epoch)  # the rate of this run's schedule, not the one stored
        if self.do_grad_scaling and manifest.loss_scaler:
            state = {name: np.asarray(value) for name, value in manifest.loss_scaler.items()}
            self.scaler.load_state_dict(state)

    def load_best(self) -> None:
        """After training: the weights of the best evaluation, under any plan, in place of the last ones.

        Raises:
            CheckpointError: when its checkpoint is not whole.
        """
        best = self.best
        if best.folder is None or best.step == self.state.global_step:
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
        with PieceFolder.open(folder) as pieces:
            reload_weights(self.held, pieces)
        logger.info(f"{best.describe()}: {folder.name} is the final model")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to do: every step seeds its own random numbers."""
