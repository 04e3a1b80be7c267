"""Checkpoints of a run: written into a temporary folder, then renamed, so that each is complete or absent.

The tensors are in one safetensors file per rank (see oarlock.weights.sharded_store); everything else a run needs is in
the manifest. No pickle is ever read, nothing is gathered to write it, and any plan can resume from it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from oarlock.config.load import flatten
from oarlock.environment import matmul_library
from oarlock.environment.console import get_logger
from oarlock.environment.ranks import is_first_rank
from oarlock.errors import CheckpointError, OutputLost, StoppedWithOthers, report
from oarlock.parallel.object_collectives import all_gather_objects, run_on_all_ranks
from oarlock.train.checkpoint.local_shards import LocalShards
from oarlock.train.checkpoint.manifest import TRAINER_STATE, Manifest, list_checkpoints, make_checkpoint_path
from oarlock.train.checkpoint.manifest_fields import BestState, ScalerState
from oarlock.train.checkpoint.model_files import ModelFiles
from oarlock.train.checkpoint.pending_save import PendingSave, delete_folder
from oarlock.train.output.folder_guard import check_output_dir, describe_newest_checkpoint, explain_error
from oarlock.versions import read_package_versions

if TYPE_CHECKING:
    from oarlock.config.run_config import RunConfig
    from oarlock.parallel.plan import ParallelPlan
    from oarlock.train.intervals import Progress

logger = get_logger(__name__)


class CheckpointWriter:
    """Writes output_dir/checkpoint-<step>, and deletes the oldest checkpoints.

    Args:
        shards: the parameters and optimizer states on this rank.
        files: the files that make the checkpoint a model folder.
        config: the run's. With --async_save the state is copied, and written while training continues.
        data_fingerprint: fingerprint of the training data.
    """

    def __init__(
        self, shards: LocalShards, files: ModelFiles, config: RunConfig, plan: ParallelPlan, data_fingerprint: str
    ) -> None:
        self._shards, self._files, self._config, self._plan = shards, files, config, plan
        self._data_fingerprint = data_fingerprint
        self.output_dir, self.background = Path(config.checkpoint.output_dir), config.checkpoint.async_save
        self._pending: PendingSave | None = None

    def save(
        self,
        state: Any,
        progress: Progress,
        window_loss: float,
        lr_scheduler: Any,
        scaler: Any,
        best: BestState | None,
    ) -> None:
        """Write a checkpoint, on all ranks.

        Args:
            state: PaddleNLP's TrainerState.
            window_loss: sum of the step losses since the last log row, averaged over the ranks.
            scaler: GradScaler of fp16 loss scaling, or None.
            best: the best evaluation so far.

        Raises:
            CheckpointError: if it can't be written. The incomplete folder is removed; earlier checkpoints are kept.
        """
        base, scaler_state = self._files.base, None
        if scaler is not None:
            arrays = {name: np.asarray(value).tolist() for name, value in scaler.state_dict().items()}
            scaler_state = cast(ScalerState, arrays)
        manifest = Manifest(
            step=state.global_step,
            samples=progress.samples,
            seed=self._config.runtime.seed,
            lr_scheduler=lr_scheduler.state_dict(),
            loss_window=(window_loss, progress.window_steps),
            config=flatten(self._config),
            data_fingerprint=self._data_fingerprint,
            loss_scaler=scaler_state,
            base={"name": base.name, "fingerprint": base.fingerprint} if base is not None else None,
            best=best,
            owes_evaluation=progress.owes_evaluation,
            planned_steps=state.max_steps,
            plan=self._plan.describe(),
            versions=read_package_versions(),
            products=matmul_library.find_library_in_use(),
        )
        with contextlib.suppress(CheckpointError, StoppedWithOthers):  # was reported when it happened
            self.finish()
        save = self._write(manifest, state)
        if self.background:
            self._pending = save
            save.start(self._config.runtime.collective_timeout, lambda error: self._report(save, error))
        else:
            self._report(save)

    def _write(self, manifest: Manifest, state: Any) -> PendingSave:
        """Write the checkpoint, or only copy the state for a save in the background."""
        final = make_checkpoint_path(self.output_dir, manifest.step)
        partial = self.output_dir / f".checkpoint-{manifest.step}.partial"
        saves: list[PendingSave] = []
        parts: list[dict[str, Any]] = []

        def prepare() -> None:
            check_output_dir(self.output_dir)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            state.save_to_json(str(partial / TRAINER_STATE))
            self._files.write(partial)

        def begin() -> None:
            saves.append(PendingSave(self._shards.tensors_to_write(), manifest, partial, final, copy=self.background))
            if not self.background:
                parts.append(saves[0].write())

        with _clean_up_on_error(final):
            run_on_all_ranks(prepare, first_rank_only=True)
            run_on_all_ranks(begin)
            if not self.background:
                all_parts = all_gather_objects(parts[0])
                run_on_all_ranks(lambda: saves[0].commit(all_parts), first_rank_only=True)
        return saves[0]

    def finish(self) -> None:
        """Wait, on all ranks, for a save in the background if there is one.

        Raises:
            CheckpointError: if it failed.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with _clean_up_on_error(pending.final):
                run_on_all_ranks(pending.wait)

    def _report(self, save: PendingSave, error: Exception | None = None) -> None:
        """Report how a save ended, and delete older checkpoints."""
        if isinstance(error, OutputLost):  # the run will notice
            return
        if error is not None:
            report(CheckpointError(_describe_failure(save.final, error)))
            return
        if is_first_rank():
            keep, best = self._config.checkpoint.save_total_limit, save.manifest.best
            # The best checkpoint when this one was saved; a better one may still be in writing.
            try:
                rotate(self.output_dir, keep, best and best["name"], save.manifest.step)
            except OSError as problem:  # this checkpoint is complete; the next save will fail
                logger.info(f"an old checkpoint could not be deleted: {explain_error(problem, self.output_dir)}")
        copied = f"copied in {save.copy_seconds:.1f} s, " if save.copy_seconds else ""
        logger.info(f"checkpoint: {save.final} ({copied}written in {save.write_seconds:.1f} s)")


@contextlib.contextmanager
def _clean_up_on_error(final: Path) -> Iterator[None]:
    """After a failed save, delete the incomplete folder and name the newest checkpoint."""
    try:
        yield
    except (StoppedWithOthers, OutputLost):
        raise
    except Exception as error:
        check_output_dir(final.parent)
        shutil.rmtree(final.parent / f".{final.name}.partial", ignore_errors=True)
        raise CheckpointError(_describe_failure(final, error)) from error


def _describe_failure(final: Path, error: Exception) -> str:
    why, kept = explain_error(error, final.parent), describe_newest_checkpoint(final.parent, excluded=final)
    return f"checkpoint {final.name} could not be written: {why}. {kept}"


def rotate(output_dir: Path, keep: int | None, best: str | None = None, newest: int | None = None) -> None:
    """Delete the oldest checkpoints beyond `keep`; never the best one.

    Args:
        newest: step of the checkpoint just written. Later ones are damaged, or this run would have resumed from them.
            They don't count, and are kept until this run replaces them.
    """
    if keep is None:
        return
    steps = {path: int(path.name.partition("-")[2]) for path in list_checkpoints(output_dir)}
    others = [path for path, step in steps.items() if path.name != best and (newest is None or step <= newest)]
    for path in others[max(1, keep - (best is not None)) :]:
        delete_folder(path)
