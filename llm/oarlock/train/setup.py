"""What pretraining and fine-tuning share: start, record, train, finish."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paddle

from oarlock.config.command_line import to_yaml
from oarlock.config.device import choose_device, fit_to_device
from oarlock.config.load import LoadedConfig, flatten
from oarlock.environment import matmul_library
from oarlock.environment.console import get_logger, log_once
from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level, start_up_left_uncollected
from oarlock.environment.ranks import is_first_rank, rank, world_size
from oarlock.errors import EnvironmentProblem, ModelError, StoppedWithOthers, failure_listeners
from oarlock.models.build import num_parameters
from oarlock.models.place import place_model
from oarlock.ops import install as fused_ops
from oarlock.parallel.family_rules import ModelSizes
from oarlock.parallel.make_plan import make_plan
from oarlock.parallel.object_collectives import run_on_all_ranks
from oarlock.parallel.plan import ParallelPlan
from oarlock.parallel.plan_rules import check_plan, refuse, slicing_problems
from oarlock.parallel.training_args import training_arguments, visualdl_dir
from oarlock.train.checkpoint.final_model import save_final_model
from oarlock.train.checkpoint.manifest import list_checkpoints
from oarlock.train.checkpoint.resume import ResumePoint, recorded_products
from oarlock.train.output.folder_guard import check_output, last_good_state
from oarlock.train.output.run_record import record_run
from oarlock.train.reporters.reporters import Console, EvaluateOnStart, MetricsFile, SampleLog, VisualDLReporter
from oarlock.train.schedule import check_warmup, rate_change
from oarlock.train.seeds import seed_step
from oarlock.train.stop_signals import StopRequest
from oarlock.train.trainer import OarlockTrainer
from oarlock.train.trainer_data import steps_of_a_run
from oarlock.weights.buffers import array_type

if TYPE_CHECKING:
    from oarlock.config.run_config import RunConfig
    from oarlock.data.corpus.order import SampleOrder
    from oarlock.models.build import ModelSource

logger = get_logger(__name__)


@dataclass
class Run:
    """A started run.

    Attributes:
        config: with device and precision settled.
        dtype: of the model's weights when they are built.
        stop: set by SIGTERM.
        plan: which rank does what.
        args: PaddleNLP's TrainingArguments, once connect() was called.
    """

    config: Any
    dtype: str
    stop: StopRequest
    plan: ParallelPlan
    args: Any = None


def start(loaded: LoadedConfig[Any]) -> Run:
    """Settle the device, the threads and the log, and have CPU ranks meet.

    Raises:
        EnvironmentProblem: when there is no such device, or ranks do not come.
    """
    config: RunConfig = loaded.config
    threads = import_paddle(config.runtime.num_threads)
    set_paddlenlp_log_level(config.logging.log_level)
    device = choose_device(config.runtime.device)
    paddle.set_device(device)
    config = fit_to_device(config, device)
    if device == "cpu":
        _choose_products(recorded_products(config))
    fused_ops.use(config.kernels.fused_ops and device == "cpu")
    output_dir = Path(config.checkpoint.output_dir)
    plan, notes = make_plan(config, world_size())
    _meet(plan, device, config.runtime.collective_timeout)
    for note in notes:
        log_once(note)
    logger.info(
        f"device {device}" + (f", {_with_what(threads)}" if device == "cpu" else "") + f", output in {output_dir}"
    )
    seed_step(config.runtime.seed, 0)
    precision = config.precision
    half = precision.fp16_opt_level == "O2" and (precision.fp16 or precision.bf16)
    dtype = ("float16" if precision.fp16 else "bfloat16") if half else "float32"
    return Run(config, dtype, StopRequest().install(), plan)


def _choose_products(recorded: str | None) -> None:
    """The library for matrix products: a resumed run keeps its own, so that it goes on bit for bit.

    Args:
        recorded: in the checkpoint; "" where it does not say, None without one.
    """
    best = matmul_library.best()
    wanted = recorded if recorded in matmul_library.TITLES and not matmul_library.asked_for() else best
    problem = matmul_library.use(wanted)
    found = matmul_library.in_use()
    if problem:
        log_once(f"matrix products by {matmul_library.TITLES[wanted]} are not available: {problem}")
    if recorded and found and found != recorded:
        log_once(
            f"the checkpoint's matrix products are {matmul_library.TITLES.get(recorded, recorded)}'s, here they are "
            f"{matmul_library.TITLES[found]}'s: the last bits may differ from a run without a stop"
        )
    elif recorded == "" and found == matmul_library.ONEDNN:
        log_once(
            "the checkpoint does not say which library made its matrix products, here it is oneDNN: the last bits may "
            f"differ from a run without a stop ({matmul_library.VARIABLE}=mkl multiplies as earlier versions did)"
        )
    elif recorded and found != best:
        log_once(
            f"matrix products go on by {matmul_library.TITLES[found]}, as in the checkpoint; a new run here would take "
            f"{matmul_library.TITLES[best]}"
        )


def _with_what(threads: int) -> str:
    title = matmul_library.TITLES.get(matmul_library.in_use(), "")
    return f"{threads} thread(s)" + (f", matrix products by {title}" if title else "")


def connect(run: Run, source: ModelSource, seq_length: int) -> None:
    """Make the process groups (TrainingArguments does), after all that can be checked from the configuration alone.

    Raises:
        ConfigError: when the plan does not fit the model.
        EnvironmentProblem: when a rank can't write into output_dir.
    """
    sizes = ModelSizes.of(source.config)
    for note in check_plan(run.plan, sizes, seq_length):
        log_once(note)
    refuse(slicing_problems(run.config, run.plan, sizes), run.plan.world_size)
    if run.plan.world_size > 1:
        logger.info(f"plan: {run.plan.describe()}")
    run.args = training_arguments(run.config, run.plan)
    run_on_all_ranks(lambda: _check_writable(Path(run.config.checkpoint.output_dir)))
    place_model(source, run.plan, rank())


def _check_writable(output_dir: Path) -> None:
    """On every rank: a machine may lack the disk that the others share."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".writable-{rank()}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EnvironmentProblem(f"--output_dir {output_dir}: can't be written: {error.strerror}") from error


def _meet(plan: ParallelPlan, device: str, timeout_s: float) -> None:
    """CPU ranks meet before they do anything else; GPU ranks do when Paddle makes their groups."""
    if plan.world_size > 1 and device == "cpu":
        _lend_fleet_a_cpu(timeout_s)


def _lend_fleet_a_cpu(timeout_s: float) -> None:
    from oarlock.cpu_ranks import fleet_patches, process_group

    os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"  # what Paddle calls the backend without a device; launchers differ
    process_group.install(timeout_s)
    failure_listeners.append(process_group.announce_failure)
    fleet_patches.install()


def held_beside(run: Run) -> int:
    """Bytes that training holds beside each trained parameter, at least: its gradient, and AdamW's two moments.

    What ranks share (sharding) counts with this rank's part of it; nothing where nothing is trained.
    """
    if not run.config.evaluation.do_train:
        return 0
    gradient, moments = array_type(run.dtype).itemsize, 2 * 4
    shared = run.plan.sharding
    return (gradient if run.plan.sharding_strategy in ("none", "optimizer") else gradient // shared) + moments // shared


def check_schedule(run: Run, order: SampleOrder | None, resume: ResumePoint | None) -> None:
    """Compare the schedule with the length of the run, which is known once the data is counted; before the model is
    built.

    Args:
        order: of the training data, None where nothing is trained.

    Raises:
        ConfigError: for a warm-up that leaves no step of the run.
    """
    if order is not None:
        steps = steps_of_a_run(run.config, run.args, order, resume)
        check_warmup(run.config.schedule, steps, resume.manifest.step if resume else 0)


def make_trainer(run: Run, model: Any, resume: ResumePoint | None, **kwargs: Any) -> OarlockTrainer:
    """The trainer with its callbacks, and the run's record in output_dir."""
    config = run.config
    output_dir = Path(config.checkpoint.output_dir)
    total, trainable = num_parameters(model)
    logger.info(f"model: {type(model).__name__}, {total:,} parameters{_here(run)}, {trainable:,} of them trained")
    text = to_yaml(config)
    if is_first_rank():
        record_run(output_dir, text)
    cut_after = (resume.manifest.step if resume else 0) if config.evaluation.do_train else None
    callbacks: list[Any] = [
        Console(config.logging.disable_tqdm),
        MetricsFile(output_dir / "metrics.jsonl", cut_after),
    ]
    reporter = None
    if config.logging.report_to == "visualdl":
        reporter = VisualDLReporter(visualdl_dir(config), flatten(config), text, output_dir)
        callbacks.append(reporter)
    on_start = EvaluateOnStart(config.evaluation.eval_on_start)
    if config.evaluation.do_eval:
        callbacks.append(on_start)
    trainer = OarlockTrainer(
        config=config,
        plan=run.plan,
        model=model,
        args=run.args,
        resume=resume,
        stop=run.stop,
        callbacks=callbacks,
        **kwargs,
    )
    on_start.trainer = trainer
    trainer.samples = SampleLog(output_dir / "samples.jsonl", reporter, cut_after)
    _remove_printer(trainer)
    return trainer


def _here(run: Run) -> str:
    return " on this rank" if run.plan.tensor * run.plan.pipeline > 1 else ""


def _remove_printer(trainer: OarlockTrainer) -> None:
    from paddlenlp.trainer import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _how_to_train_more(trainer: OarlockTrainer, resume: ResumePoint) -> str:
    """What a run that has reached its end has to say."""
    if trainer.best.exhausted:
        return (
            f"this run is complete: it stopped after {trainer.best.evaluations_since} evaluation(s) without an "
            f"improvement; to train on, give a larger --early_stopping_patience (now {trainer.best.patience})"
        )
    schedule = trainer.config.schedule
    length = f"--num_train_epochs (now {schedule.num_train_epochs:g})"
    if schedule.max_steps > 0:
        length = f"--max_steps (now {schedule.max_steps})"
    return (
        f"this run is complete; to train on, give a larger {length} and --resume_from_checkpoint {resume.folder}; "
        "--overwrite_output_dir starts anew"
    )


def train(run: Run, trainer: OarlockTrainer) -> bool:
    """Train to the end, or to a SIGTERM; returns whether the end was reached. The final model goes to output_dir."""
    config = run.config
    output_dir = Path(config.checkpoint.output_dir)
    resume = trainer.resume
    assert trainer.order is not None
    steps = trainer.planned_steps()
    if resume:
        logger.info(
            f"going on from {resume.folder} (step {resume.manifest.step}, {resume.manifest.samples:,} samples seen)"
        )
        if resume.manifest.step >= steps:
            logger.info(_how_to_train_more(trainer, resume))
        elif before := resume.manifest.planned_steps:
            change = rate_change(config.schedule, steps, resume.manifest.config, before, resume.manifest.step)
            if change:
                logger.info(change)
    logger.info(f"{steps:,} steps of {trainer.global_batch:,} samples ({trainer.order.num_samples:,} samples an epoch)")
    trainer.args.max_steps = steps
    run.stop.training = True
    try:
        with start_up_left_uncollected():
            trainer.train_or_resume()
        trainer.finish_save()
    except StoppedWithOthers:
        kept = next(iter(list_checkpoints(output_dir)), None)
        logger.info(
            f"{kept.name} is whole; the same command goes on from it" if kept else "no checkpoint was written yet"
        )
        raise
    done = trainer.state.global_step
    if done < steps and not trainer.best.exhausted:
        logger.info(f"stopped by {run.stop.name} at step {done}; the same command goes on from there")
        return False
    if config.checkpoint.load_best_model_at_end:
        trainer.load_best()
    run_on_all_ranks(lambda: check_output(output_dir), first_rank_only=True)
    try:
        save_final_model(trainer, output_dir)
    except ModelError as error:
        check_output(output_dir)
        raise ModelError(f"{error}. {last_good_state(output_dir)}") from error
    what = "model" if trainer.method is None else "adapter"
    logger.info(f"done: {done:,} steps; the {what} is in {output_dir}")
    return True
