"""Trains a model that has been built, and saves the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paddlenlp.trainer import PrinterCallback

from oarlock.config.command_line import to_yaml
from oarlock.config.load import ConfigT, flatten
from oarlock.environment.console import get_logger
from oarlock.environment.memory import freeze_garbage_collection
from oarlock.environment.ranks import is_first_rank
from oarlock.errors import ModelError, StoppedWithOthers
from oarlock.models.build import count_parameters
from oarlock.parallel.object_collectives import run_on_all_ranks
from oarlock.parallel.training_args import find_visualdl_dir
from oarlock.train.checkpoint.final_model import save_final_model
from oarlock.train.checkpoint.manifest import list_checkpoints
from oarlock.train.checkpoint.model_files import ModelFiles
from oarlock.train.checkpoint.resume import ResumePoint
from oarlock.train.evaluation.best import BestEvaluation, load_best_weights
from oarlock.train.evaluation.prompt_evaluation import PromptEvaluation
from oarlock.train.evaluation.prompts import PromptSet
from oarlock.train.optim.schedule import check_warmup, describe_rate_change
from oarlock.train.output.folder_guard import check_output_dir, describe_newest_checkpoint
from oarlock.train.output.run_record import record_run
from oarlock.train.reporters.console import Console
from oarlock.train.reporters.jsonl import MetricsFile
from oarlock.train.reporters.samples import SampleLog
from oarlock.train.reporters.visualdl import VisualDLReporter
from oarlock.train.run_length import count_samples_per_step, plan_steps
from oarlock.train.setup import Run
from oarlock.train.trainer import OarlockTrainer

if TYPE_CHECKING:
    from oarlock.data.corpus.order import SampleOrder
    from oarlock.data.templates.chat_template import ChatTemplate
    from oarlock.peft.adapter_folder import Base
    from oarlock.peft.method import Method

logger = get_logger(__name__)


def check_schedule(run: Run[ConfigT], order: SampleOrder | None, resume: ResumePoint | None) -> None:
    """Check that the warm-up is shorter than the run, whose length is known once the data is counted.

    Args:
        order: order of the training data; None if nothing is trained.

    Raises:
        ConfigError: if no step follows the warm-up.
    """
    if order is not None:
        steps = plan_steps(run.config, run.args, order, resume)
        check_warmup(run.config.schedule, steps, resume.manifest.step if resume else 0)


def make_trainer(
    run: Run[ConfigT],
    model: Any,
    resume: ResumePoint | None,
    *,
    order: SampleOrder | None,
    tokenizer: Any,
    template: ChatTemplate | None,
    method: Method | None = None,
    base: Base | None = None,
    generation: Mapping[str, Any] | None = None,
    prompt_sets: Sequence[PromptSet] = (),
    **kwargs: Any,
) -> OarlockTrainer:
    """Create the trainer with its reporters, and record the run in output_dir.

    Args:
        order: order of the training data; None if nothing is trained.
        method, base: fine-tuning method and base model, if an adapter is trained.
        generation: content of generation_config.json.
        prompt_sets: prompts that the model answers at evaluations.
        kwargs: other arguments of OarlockTrainer.
    """
    config = run.config
    output_dir = Path(config.checkpoint.output_dir)
    total, trainable = count_parameters(model)
    here = " on this rank" if run.plan.tensor * run.plan.pipeline * run.plan.expert > 1 else ""
    logger.info(f"model: {type(model).__name__}, {total:,} parameters{here}, {trainable:,} of them trainable")
    text = to_yaml(config)
    if is_first_rank():
        record_run(output_dir, text)
    cut_after = (resume.manifest.step if resume else 0) if config.evaluation.do_train else None
    callbacks: list[Any] = [Console(config.logging.disable_tqdm), MetricsFile(output_dir / "metrics.jsonl", cut_after)]
    visualdl = None
    if config.logging.report_to == "visualdl":
        visualdl = VisualDLReporter(find_visualdl_dir(config), flatten(config), text, output_dir)
        callbacks.append(visualdl)
    samples = SampleLog(output_dir / "samples.jsonl", visualdl, cut_after)
    best = BestEvaluation.from_config(config, resume)
    if resume and best.exhausted:  # it stopped early: no steps are left
        steps = resume.manifest.step
    else:
        steps = plan_steps(config, run.args, order, resume) if order is not None else 0
    trainer = OarlockTrainer(
        config=config,
        plan=run.plan,
        model=model,
        args=run.args,
        steps=steps,
        order=order,
        resume=resume,
        best=best,
        stop=run.stop,
        files=ModelFiles(model.config, tokenizer, template, generation, method, base),
        prompts=PromptEvaluation(prompt_sets, samples, tokenizer, template, generation),
        tokenizer=tokenizer,
        callbacks=callbacks,
        **kwargs,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _explain_completion(trainer: OarlockTrainer, resume: ResumePoint) -> str:
    """Explain that a run is complete, and how to train longer."""
    if trainer.best.exhausted:
        return (
            f"this run is complete: it stopped after {trainer.best.evaluations_since} evaluation(s) without "
            f"improvement; to train longer, increase --early_stopping_patience (now {trainer.best.patience})"
        )
    schedule = trainer.config.schedule
    length = f"--num_train_epochs (now {schedule.num_train_epochs:g})"
    if schedule.max_steps > 0:
        length = f"--max_steps (now {schedule.max_steps})"
    return (
        f"this run is complete; to train longer, increase {length} and add --resume_from_checkpoint {resume.folder}; "
        "--overwrite_output_dir starts over"
    )


def run_training(run: Run[ConfigT], trainer: OarlockTrainer) -> bool:
    """Train to the end or until SIGTERM, and write the final model to output_dir; returns whether it ended."""
    config = run.config
    output_dir = Path(config.checkpoint.output_dir)
    resume = trainer.resume
    assert trainer.order is not None
    steps = trainer.steps
    if resume:
        logger.info(
            f"resuming from {resume.folder} (step {resume.manifest.step}, {resume.manifest.samples:,} samples seen)"
        )
        if resume.manifest.step >= steps:
            logger.info(_explain_completion(trainer, resume))
        elif before := resume.manifest.planned_steps:
            change = describe_rate_change(config.schedule, steps, resume.manifest.config, before, resume.manifest.step)
            if change:
                logger.info(change)
    samples, epoch = count_samples_per_step(trainer.args), trainer.order.num_samples
    logger.info(f"{steps:,} steps of {samples:,} samples ({epoch:,} samples per epoch)")
    trainer.args.max_steps = steps
    run.stop.training = True
    try:
        with freeze_garbage_collection():
            trainer.train(resume_from_checkpoint=str(resume.folder) if resume else None)
        trainer.checkpoints.finish()
    except StoppedWithOthers:
        kept = next(iter(list_checkpoints(output_dir)), None)
        logger.info(
            f"{kept.name} is complete; the same command resumes from it" if kept else "no checkpoint was written yet"
        )
        raise
    done = trainer.state.global_step
    if done < steps and not trainer.best.exhausted:
        logger.info(f"stopped by {run.stop.name} at step {done}; the same command resumes from there")
        return False
    if config.checkpoint.load_best_model_at_end:
        load_best_weights(trainer.best, done, trainer.shards)
    run_on_all_ranks(lambda: check_output_dir(output_dir), first_rank_only=True)
    try:
        save_final_model(trainer.shards, trainer.files, output_dir)
    except ModelError as error:
        check_output_dir(output_dir)
        raise ModelError(f"{error}. {describe_newest_checkpoint(output_dir)}") from error
    what = "model" if trainer.files.method is None else "adapter"
    logger.info(f"done: {done:,} steps; the {what} is in {output_dir}")
    return True
