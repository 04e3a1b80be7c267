"""The start of a run: device, threads, process groups, plan."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import paddle

from oarlock.config.device import choose_device, fit_to_device
from oarlock.config.load import ConfigT, LoadedConfig
from oarlock.environment import matmul_library
from oarlock.environment.console import get_logger, log_once
from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level
from oarlock.environment.ranks import rank, world_size
from oarlock.errors import EnvironmentProblem, failure_listeners
from oarlock.families.model_sizes import ModelSizes
from oarlock.models.build import set_parallel_fields
from oarlock.ops import install as fused_ops
from oarlock.parallel.expert_groups import make_expert_groups
from oarlock.parallel.make_plan import make_plan
from oarlock.parallel.object_collectives import run_on_all_ranks
from oarlock.parallel.plan import ParallelPlan
from oarlock.parallel.plan_rules import check_plan, find_slicing_problems, refuse
from oarlock.parallel.training_args import make_training_arguments
from oarlock.train.checkpoint.resume import read_recorded_matmul_library
from oarlock.train.optim.seeds import seed_step
from oarlock.train.stop_signals import StopRequest
from oarlock.weights.buffers import array_type

if TYPE_CHECKING:
    from oarlock.models.build import ModelSource

logger = get_logger(__name__)


@dataclass
class Run(Generic[ConfigT]):
    """A run that has been started.

    Attributes:
        config: the configuration, fitted to the device.
        dtype: data type of the model's weights when they are built.
        stop: set by SIGTERM.
        plan: the parallel plan.
        args: PaddleNLP's TrainingArguments, set by connect_ranks().
    """

    config: ConfigT
    dtype: str
    stop: StopRequest
    plan: ParallelPlan
    args: Any = None


def start_run(loaded: LoadedConfig[ConfigT]) -> Run[ConfigT]:
    """Set up device, threads and log, and connect CPU ranks.

    Raises:
        EnvironmentProblem: if the device does not exist, or a rank is missing.
    """
    config = loaded.config
    threads = import_paddle(config.runtime.num_threads)
    set_paddlenlp_log_level(config.logging.log_level)
    device = choose_device(config.runtime.device)
    paddle.set_device(device)
    config = fit_to_device(config, device)
    if device == "cpu":
        choose_matmul_library(read_recorded_matmul_library(config))
    fused_ops.use(config.kernels.fused_ops and device == "cpu")
    output_dir = Path(config.checkpoint.output_dir)
    plan, notes = make_plan(config, world_size())
    connect_cpu_ranks(plan, device, config.runtime.collective_timeout)
    for note in notes:
        log_once(note)
    used = [f"device {device}"]
    if device == "cpu":
        used.append(f"{threads} thread(s)")
        if library := matmul_library.find_library_in_use():
            used.append(f"matrix multiplication by {matmul_library.TITLES[library]}")
    logger.info(f"{', '.join(used)}, output in {output_dir}")
    seed_step(config.runtime.seed, 0)
    precision = config.precision
    half = precision.fp16_opt_level == "O2" and (precision.fp16 or precision.bf16)
    dtype = ("float16" if precision.fp16 else "bfloat16") if half else "float32"
    return Run(config, dtype, StopRequest().install(), plan)


def choose_matmul_library(recorded: str | None) -> None:
    """Choose the matrix multiplication library. A resumed run keeps its library, so that its results are the same.

    Args:
        recorded: the library of the checkpoint; "" if it does not name one, None without a checkpoint.
    """
    best = matmul_library.choose_library()
    wanted = recorded if recorded in matmul_library.TITLES and not matmul_library.read_requested_library() else best
    problem = matmul_library.use_library(wanted)
    found = matmul_library.find_library_in_use()
    if found == matmul_library.MKL != wanted:
        # The fused operators too: a resumed run, which reads MKL in the checkpoint, multiplies everything with it.
        problem = matmul_library.use_library(found) or problem or "Paddle has multiplied before in this process"
    if problem:
        log_once(f"{matmul_library.TITLES[wanted]} is not available for matrix multiplication: {problem}")
    if recorded and found and found != recorded:
        log_once(
            f"the checkpoint was made with {matmul_library.TITLES.get(recorded, recorded)}, this run multiplies with "
            f"{matmul_library.TITLES[found]}: results may differ in the last bits from an uninterrupted run"
        )
    elif recorded == "" and found == matmul_library.ONEDNN:
        log_once(
            "the checkpoint does not name its matrix multiplication library, this run uses oneDNN: results may differ "
            f"in the last bits from an uninterrupted run (earlier versions used {matmul_library.VARIABLE}=mkl)"
        )
    elif recorded and found != best:
        log_once(
            f"matrix multiplication by {matmul_library.TITLES[found]}, as in the checkpoint; a new run would use "
            f"{matmul_library.TITLES[best]}"
        )


def connect_ranks(run: Run[ConfigT], source: ModelSource, seq_length: int) -> None:
    """Check the plan against the model, then create the process groups (TrainingArguments does so).

    Raises:
        ConfigError: if the plan does not fit the model.
        EnvironmentProblem: if a rank can't write into output_dir.
    """
    sizes = ModelSizes.from_config(source.config)
    for note in check_plan(run.plan, sizes, seq_length):
        log_once(note)
    refuse(find_slicing_problems(run.config, run.plan, sizes), run.plan.world_size)
    if run.plan.world_size > 1:
        logger.info(f"plan: {run.plan.describe()}")
    run.args = make_training_arguments(run.config, run.plan)
    make_expert_groups(run.plan)
    run_on_all_ranks(lambda: _check_writable(Path(run.config.checkpoint.output_dir)))
    set_parallel_fields(source.config, run.plan, rank())


def _check_writable(output_dir: Path) -> None:
    """Check, on every rank, that output_dir can be written: one machine may lack the shared disk."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".writable-{rank()}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EnvironmentProblem(f"--output_dir {output_dir}: can't be written: {error.strerror}") from error


def connect_cpu_ranks(plan: ParallelPlan, device: str, timeout_s: float) -> None:
    """Connect CPU ranks before anything else. GPU ranks connect when Paddle creates their groups."""
    if plan.world_size > 1 and device == "cpu":
        install_cpu_groups(timeout_s)


def install_cpu_groups(timeout_s: float) -> None:
    """Make Fleet work on a CPU, with the process groups of oarlock.cpu_ranks."""
    from oarlock.cpu_ranks import fleet_patches, process_group

    os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"  # Paddle's name of the CPU backend, which not every launcher sets
    process_group.install(timeout_s)
    failure_listeners.append(process_group.announce_failure)
    fleet_patches.install()


def training_bytes(run: Run) -> int:
    """Least bytes of training state per trained parameter on this rank: its gradient and AdamW's two moments.

    State that is sharded counts with this rank's share. 0 if nothing is trained.
    """
    if not run.config.evaluation.do_train:
        return 0
    gradient, moments = array_type(run.dtype).itemsize, 2 * 4
    if run.plan.sharding_strategy not in ("none", "optimizer"):
        gradient //= run.plan.sharding
    return gradient + moments // run.plan.sharding
