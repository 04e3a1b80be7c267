"""Rehearses a parallel plan: trains a small model of the same structure on CPU ranks and in a single process.

Both run the code of a real run, Fleet and Trainer included. `oarlock rehearse` accepts a configuration or a launch
command.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from oarlock.config.load import flatten, load_flat_config
from oarlock.config.run_config import RunConfig
from oarlock.cpu_ranks.fork_launch import launch
from oarlock.environment.console import get_logger
from oarlock.environment.cpu import count_available_cores
from oarlock.errors import ModelError, TrainingError
from oarlock.families.model_sizes import EXPERT_COUNTS, ModelSizes
from oarlock.model_config.builtin_configs import read_config_by_name
from oarlock.parallel.launch_command import TrainingCommand
from oarlock.parallel.make_plan import make_plan
from oarlock.parallel.plan import ParallelPlan
from oarlock.parallel.plan_rules import check_plan
from oarlock.train.rehearsal.rank import RankReport, run_rank

logger = get_logger(__name__)

_HEAD_DIM = 8
# Relative for losses, absolute for weights: float32 sums in another order may differ by this much.
TOLERANCE = 1e-5


@dataclass
class Verdict:
    """The result of a rehearsal.

    Attributes:
        reference: the report of the single process.
        reports: the report of each rank; empty if a rank failed.
        problem: the failure, or the first difference; None if there is none.
    """

    plan: ParallelPlan
    reference: RankReport
    reports: list[RankReport] = field(default_factory=list)
    problem: str | None = None


def shrink_model(content: dict[str, Any], plan: ParallelPlan) -> dict[str, Any]:
    """Shrink a config.json, keeping family, head ratio, tied embeddings and divisibility by the plan."""
    heads = content["num_attention_heads"]
    kv_heads = content.get("num_key_value_heads") or heads
    ratio = heads // kv_heads
    small_kv = plan.tensor if plan.tensor > 1 else min(2, kv_heads)
    small_heads = small_kv * ratio
    hidden = small_heads * _HEAD_DIM
    special = [name for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in content]
    small: dict[str, Any] = content | {
        "num_attention_heads": small_heads,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": max(2, plan.pipeline * plan.virtual_pipeline),
        "vocab_size": 64 * plan.tensor,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,  # at the usual 0.02 such a small model hardly mixes its inputs
    }
    small |= dict.fromkeys(special, 0)
    if "num_key_value_heads" in content:
        small["num_key_value_heads"] = small_kv
    if "head_dim" in content:
        small["head_dim"] = _HEAD_DIM
    return small | _shrink_experts(content, plan, hidden)


def _shrink_experts(content: dict[str, Any], plan: ParallelPlan, hidden: int) -> dict[str, Any]:
    """Return the further sizes of a mixture of experts or of latent attention, by transformers' names."""
    groups = content.get("n_group") or 1
    sizes = dict.fromkeys(EXPERT_COUNTS, 2 * math.lcm(plan.expert, groups))
    sizes |= {"num_experts_per_tok": 2, "moe_intermediate_size": hidden, "shared_expert_intermediate_size": hidden}
    sizes |= dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 2 * _HEAD_DIM)
    sizes |= dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), _HEAD_DIM)
    sizes["first_k_dense_replace"] = min(1, content.get("first_k_dense_replace") or 0)  # dense layers before the others
    return {name: size for name, size in sizes.items() if content.get(name) is not None}


def shrink_config(config: RunConfig, plan: ParallelPlan, model: Path, output_dir: Path, steps: int) -> RunConfig:
    """Change a configuration to the small model: a few steps, short sequences, no checkpoints, float32."""
    length = 16 * plan.tensor if plan.sequence_parallel else 24
    # Pipeline schedules depend on the micro-batches per stage; beyond that, more of them only take time.
    micro_batches = min(config.batch.gradient_accumulation_steps, max(2, 2 * plan.pipeline))
    changes: dict[str, Any] = {
        "model_name_or_path": str(model),
        "tokenizer_name_or_path": None,
        "model_type": None,
        "output_dir": str(output_dir),
        "overwrite_output_dir": True,
        "resume_from_checkpoint": None,
        "device": "cpu",
        "num_threads": 1,
        "fp16": False,
        "bf16": False,
        "amp_master_grad": False,
        "use_flash_attention": False,
        "use_fused_rms_norm": False,
        "do_train": True,
        "do_eval": True,
        "do_generation": False,
        "eval_on_start": False,
        "eval_steps": 10**9,
        "max_evaluate_steps": -1,
        "max_steps": steps,
        "warmup_steps": 0,
        "warmup_ratio": 0.0,
        "decay_steps": None,
        "learning_rate": 1e-3,
        # Adam's update is m / (sqrt(v) + epsilon). At 1e-8 the rounding noise of a gradient near zero would become a
        # full update, and any other order of sums a difference.
        "adam_epsilon": 1e-5,
        "min_learning_rate": 0.0,
        "gradient_accumulation_steps": micro_batches,
        "per_device_train_batch_size": min(2, config.batch.per_device_train_batch_size),
        "per_device_eval_batch_size": 2,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "save_strategy": "no",
        "stage3_min_elements": 512 if plan.sequence_parallel else 64,  # see plan_rules.find_slicing_problems
        "collective_timeout": 120.0,
    }
    changes |= {"max_seq_length": length, "continue_training": True, "input_dir": None}
    changes |= {"src_length": length // 2, "tgt_length": length - length // 2, "dataset_name_or_path": None}
    changes |= {"packing_length": 2 * length if config.data.is_packed else None}
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    changes |= dict.fromkeys((*sizes, "vocab_size"))
    flat = flatten(config)
    return load_flat_config(type(config), flat | {name: value for name, value in changes.items() if name in flat})


def rehearse(command: TrainingCommand, steps: int = 5, folder: Path | None = None) -> Verdict:
    """Rehearse the plan of a command.

    Args:
        steps: number of optimizer steps.
        folder: for logs and reports. By default a temporary folder, which is deleted.

    Raises:
        ConfigError: if the plan does not fit the real model.
        TrainingError: if the single process fails.
    """
    plan, notes = make_plan(command.config, command.num_ranks)
    content = read_config_by_name(command.config.model.model_name_or_path)
    content |= command.config.model.sizes
    try:
        sizes = ModelSizes.from_config(SimpleNamespace(**content))
        small = shrink_model(content, plan)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{command.config.model.model_name_or_path}: its config.json lacks sizes: {error}") from error
    notes += check_plan(plan, sizes, command.config.sequence_length)
    for note in notes:
        logger.info(note)
    own = folder is None
    folder = Path(tempfile.mkdtemp(prefix="oarlock-rehearsal-")) if folder is None else folder
    try:
        return _run(command, plan, small, steps, folder)
    finally:
        if own:
            shutil.rmtree(folder, ignore_errors=True)


def _run(command: TrainingCommand, plan: ParallelPlan, content: dict[str, Any], steps: int, folder: Path) -> Verdict:
    model, one, many = folder / "model", folder / "one", folder / "many"
    for path in (model, one, many):
        path.mkdir(parents=True, exist_ok=True)
    small = shrink_config(command.config, plan, model, folder / "output", steps)
    logger.info(
        f"rehearsing on {count_available_cores()} core(s): {plan.describe()}; {content['num_hidden_layers']} layers, "
        f"{content['num_attention_heads']} heads, hidden size {content['hidden_size']}"
    )
    _refuse_failure(
        launch(1, lambda: make_model(content, model), folder / "log-model", quiet=True), folder / "log-model"
    )
    flat = flatten(small)
    single = {  # a single process with the same global batch
        "sharding": "",
        "sharding_parallel_degree": -1,
        "tensor_parallel_degree": -1,
        "pipeline_parallel_degree": -1,
        "virtual_pp_degree": 1,
        "expert_parallel_degree": -1,
        "sequence_parallel": False,
        "recompute": False,
        "gradient_accumulation_steps": flat["gradient_accumulation_steps"] * plan.replicas,
    }
    alone = load_flat_config(type(small), flat | single)
    codes = launch(1, lambda: run_rank(alone, one, None, TOLERANCE), folder / "log-one", quiet=True)
    _refuse_failure(codes, folder / "log-one")
    reference = RankReport.read(one, 0)
    codes = launch(plan.world_size, lambda: run_rank(small, many, one, TOLERANCE), folder / "log", quiet=True)
    if any(codes):
        rank = next(i for i, code in enumerate(codes) if code)
        return Verdict(plan, reference, problem=f"the ranks failed:\n{_read_first_error(folder / 'log', codes, rank)}")
    reports = [RankReport.read(many, i) for i in range(plan.world_size)]
    return Verdict(plan, reference, reports, find_first_difference(reference, reports))


def make_model(content: dict[str, Any], folder: Path) -> int:
    """Write a model folder with random weights for a config.json."""
    from oarlock.environment.paddle_import import set_paddlenlp_log_level
    from oarlock.model_config.load import make_config
    from oarlock.models.build import ModelSource, build_model

    set_paddlenlp_log_level("error")
    (folder / "config.json").write_text(json.dumps(content))
    model_config = make_config(content, str(folder / "config.json"))
    model_config.use_fast_layer_norm = False
    model = build_model(ModelSource(folder, model_config, from_weights=False))
    model.save_pretrained(str(folder), safe_serialization=True)
    return 0


def find_first_difference(
    reference: RankReport, reports: Sequence[RankReport], tolerance: float = TOLERANCE
) -> str | None:
    """Describe the first step, rank and tensor that differ from the single process; None if nothing differs."""
    found: list[tuple[int, int, int, str]] = []  # step, order within a step (loss, norm, update), rank, description
    for rank, report in enumerate(reports):
        values = [("gradient norm", report.grad_norms, reference.grad_norms)]
        if rank == 0:  # which logs the mean over all ranks
            values.insert(0, ("loss", report.losses, reference.losses))
        for place, (name, mine, alone) in enumerate(values):
            step = report.steps_before
            for value, expected in zip(mine, alone[step : step + len(mine)], strict=True):
                step += 1
                if not abs(value - expected) <= tolerance * abs(expected):
                    found.append((step, place, rank, f"{name} {value:.8g}, one process has {expected:.8g}"))
        if report.first_difference:
            first = report.first_difference
            found.append((first["step"], 2, rank, f"{first['tensor']} differs by {first['difference']:.3g}"))
        loss, expected_loss = report.eval_loss, reference.eval_loss
        if loss is None or expected_loss is None or not abs(loss - expected_loss) <= tolerance * abs(expected_loss):
            found.append((10**9, 3, rank, f"evaluation loss {loss}, one process has {expected_loss}"))
    if not found:
        return None
    step, _, rank, what = min(found)
    return f"{f'step {step}, ' if step < 10**9 else ''}rank {rank}: {what}"


def _refuse_failure(codes: Sequence[int], log: Path) -> None:
    if any(codes):
        raise TrainingError(f"the single process failed:\n{_read_first_error(log, codes, 0)}")


def _read_first_error(log: Path, codes: Sequence[int], rank: int) -> str:
    """Read the last lines of the log with the error, preferably of the rank that failed first."""
    for i in [rank, *range(len(codes))]:
        text = (log / f"workerlog.{i}").read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        if any("rror" in line for line in lines[-20:]):
            return "\n".join(f"  rank {i}: {line}" for line in lines[-12:])
    return f"  exit codes {list(codes)}, without a message"
