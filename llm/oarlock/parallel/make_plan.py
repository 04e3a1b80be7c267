"""Make a parallel plan from a configuration and a number of ranks."""

from __future__ import annotations

from dataclasses import replace

from oarlock.config.run_config import RunConfig
from oarlock.config.shared import ParallelSection
from oarlock.parallel.plan import ParallelPlan
from oarlock.parallel.plan_rules import find_degree_problems, find_option_problems, find_plan_problems, refuse


def make_plan(config: RunConfig, world_size: int) -> tuple[ParallelPlan, list[str]]:
    """Divide the work that a configuration describes among a number of ranks.

    A degree of -1 means 1 for tensor and pipeline. For sharding it means all ranks that these two leave, if --sharding
    is given. The data degree is what remains. On one rank the degrees are ignored, because published commands have to
    run without a launcher.

    Returns:
        The plan, and notes for the log: options that are not in effect, or that cost more than expected.

    Raises:
        ConfigError: the degrees and options don't fit together; lists every problem that shows without the model.
    """
    parallel, batch = config.parallel, config.batch
    micro_batches, micro_batch_size = batch.gradient_accumulation_steps, batch.per_device_train_batch_size
    if world_size == 1:
        return ParallelPlan(micro_batches=micro_batches, micro_batch_size=micro_batch_size), _unused(parallel)
    tensor, pipeline = max(1, parallel.tensor_parallel_degree), max(1, parallel.pipeline_parallel_degree)
    refuse(find_degree_problems(parallel, tensor, pipeline, world_size), world_size)
    left = world_size // (tensor * pipeline)
    sharding = 1
    if parallel.sharding:
        sharding = left if parallel.sharding_parallel_degree == -1 else parallel.sharding_parallel_degree
    plan = ParallelPlan(
        world_size=world_size,
        data=left // sharding,
        sharding=sharding,
        stage=int(parallel.sharding[-1]) if sharding > 1 else 0,
        tensor=tensor,
        pipeline=pipeline,
        expert=max(1, parallel.expert_parallel_degree),
        virtual_pipeline=parallel.virtual_pp_degree,
        sequence_parallel=parallel.sequence_parallel,
        micro_batches=micro_batches,
        micro_batch_size=micro_batch_size,
        length_multiple=config.data.row_length if parallel.sequence_parallel else 1,
    )
    refuse([*find_plan_problems(plan), *find_option_problems(config, plan)], world_size)
    return plan, _notes(parallel, plan)


def _unused(parallel: ParallelSection) -> list[str]:
    """Options that one process ignores, as a note. PaddleNLP drops them silently."""
    degrees = {
        "--tensor_parallel_degree": parallel.tensor_parallel_degree,
        "--pipeline_parallel_degree": parallel.pipeline_parallel_degree,
        "--virtual_pp_degree": parallel.virtual_pp_degree,
        "--sharding_parallel_degree": parallel.sharding_parallel_degree,
        "--expert_parallel_degree": parallel.expert_parallel_degree,
    }
    unused = [f"{flag} {value}" for flag, value in degrees.items() if value > 1]
    unused += ["--sequence_parallel"] if parallel.sequence_parallel else []
    unused += [f"--sharding {parallel.sharding}"] if parallel.sharding else []
    if not unused:
        return []
    return [
        f"one process: {', '.join(unused)} not in effect (start one process per rank with `python -m "
        "paddle.distributed.launch`; their number is the product of the degrees)"
    ]


def _notes(parallel: ParallelSection, plan: ParallelPlan) -> list[str]:
    notes = []
    if parallel.sharding and not plan.stage:  # TrainingArguments clears --sharding
        why = f"--sharding_parallel_degree 1 leaves nothing to shard (data {plan.data})"
        if plan.data == 1:
            users = [axis for axis in ("tensor", "pipeline") if getattr(plan, axis) > 1]
            verb = "use" if len(users) > 1 else "uses"
            why = f"{' x '.join(users)} {verb} all {plan.world_size} ranks, so none are left to shard over"
        notes.append(f"--sharding {parallel.sharding}: {why}; not in effect")
    if plan.sharding_strategy == "gradients_hooked":
        notes.append(
            "--sharding stage2 with a pipeline is not available in PaddleNLP: Fleet shards the optimizer states, "
            "Oarlock shards the gradients"
        )
    if plan.micro_batches < plan.pipeline:
        more = replace(plan, micro_batches=4 * plan.pipeline)
        notes.append(
            f"--gradient_accumulation_steps {plan.micro_batches} is less than the {plan.pipeline} pipeline stages: "
            f"each is idle for {plan.bubble:.0%} of a step; with {more.micro_batches} it would be {more.bubble:.0%}"
        )
    return notes
