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
from oarlock.parallel.make_plan import make_plan
from oarlock.parallel.object_collectives import run_on_all_ranks
from oarlock.parallel.plan import ParallelPlan
from oarlock.parallel.plan_rules import check_plan, refuse, slicing_problems
from oarlock.parallel.training_args import training_arguments
from oarlock.train.checkpoint.resume import read_recorded_matmul_library
from oarlock.train.optim.seeds import seed_step
from oarlock.train.stop_signals import StopRequest
from oarlock.weights.buffers import array_type

if TYPE_CHECKING:
    from oarlock.models.build import ModelSource

logger = get_logger(__name__)


@dataclass
class Run(Generic[ConfigT]):
    """A started run.

    Attributes:
        config: with device and precision settled.
        dtype: of the model's weights when they are built.
        stop: set by SIGTERM.
        plan: which rank does what.
        args: PaddleNLP's TrainingArguments, once connect() was called.
    """

    config: ConfigT
    dtype: str
    stop: StopRequest
    plan: ParallelPlan
    args: Any = None


def start(loaded: LoadedConfig[ConfigT]) -> Run[ConfigT]:
    """Settle the device, the threads and the log, and have CPU ranks meet.

    Raises:
        EnvironmentProblem: when there is no such device, or ranks do not come.
    """
    config = loaded.config
    threads = import_paddle(config.runtime.num_threads)
    set_paddlenlp_log_level(config.logging.log_level)
    device = choose_device(config.runtime.device)
    paddle.set_device(device)
    config = fit_to_device(config, device)
    if device == "cpu":
        _choose_products(read_recorded_matmul_library(config))
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
    best = matmul_library.choose_library()
    wanted = recorded if recorded in matmul_library.TITLES and not matmul_library.requested_library() else best
    problem = matmul_library.use_library(wanted)
    found = matmul_library.find_library_in_use()
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
    title = matmul_library.TITLES.get(matmul_library.find_library_in_use(), "")
    return f"{threads} thread(s)" + (f", matrix products by {title}" if title else "")


def connect(run: Run[ConfigT], source: ModelSource, seq_length: int) -> None:
    """Make the process groups (TrainingArguments does), after all that can be checked from the configuration alone.

    Raises:
        ConfigError: when the plan does not fit the model.
        EnvironmentProblem: when a rank can't write into output_dir.
    """
    sizes = ModelSizes.from_config(source.config)
    for note in check_plan(run.plan, sizes, seq_length):
        log_once(note)
    refuse(slicing_problems(run.config, run.plan, sizes), run.plan.world_size)
    if run.plan.world_size > 1:
        logger.info(f"plan: {run.plan.describe()}")
    run.args = training_arguments(run.config, run.plan)
    run_on_all_ranks(lambda: _check_writable(Path(run.config.checkpoint.output_dir)))
    set_parallel_fields(source.config, run.plan, rank())


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


def training_bytes(run: Run) -> int:
    """Bytes that training holds beside each trained parameter, at least: its gradient, and AdamW's two moments.

    What ranks share (sharding) counts with this rank's part of it; nothing where nothing is trained.
    """
    if not run.config.evaluation.do_train:
        return 0
    gradient, moments = array_type(run.dtype).itemsize, 2 * 4
    shared = run.plan.sharding
    whole = run.plan.sharding_strategy in ("none", "optimizer")
    return (gradient if whole else gradient // shared) + moments // shared
