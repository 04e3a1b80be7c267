"""Rules for plans: those of the models' layers and of Fleet's schedules.

They were read in the source of paddle 3.3.1 and paddlenlp 3.0.0b4. Pure Python: a plan is checked before process groups
exist, and on machines without Paddle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator

from oarlock.config.run_config import RunConfig
from oarlock.config.shared import ParallelSection
from oarlock.errors import ConfigError
from oarlock.families.model_sizes import ModelSizes
from oarlock.families.registry import FAMILIES, explain_missing
from oarlock.parallel.plan import ParallelPlan, cut_layers

Rule = Callable[[ParallelPlan, ModelSizes, int], Iterator[str]]


def refuse(problems: list[str], world_size: int) -> None:
    """Raise a ConfigError with all problems, if there are any."""
    if len(problems) > 1:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problems with the plan for {world_size} ranks:\n{listing}")
    if problems:
        raise ConfigError(problems[0])


def list_divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def nearest(value: int, legal: Collection[int]) -> str:
    """The legal numbers below and above an illegal one, as text: "2 or 4"."""
    below, above = [n for n in legal if n < value], [n for n in legal if n > value]
    return " or ".join(f"{n:,}" for n in ([max(below)] if below else []) + ([min(above)] if above else []))


# rules that need a configuration


def find_degree_problems(parallel: ParallelSection, tensor: int, pipeline: int, world_size: int) -> list[str]:
    """Reasons why the degrees don't multiply to the number of ranks."""
    problems = []
    given = parallel.sharding_parallel_degree
    # PaddleNLP warns but makes the groups. Trainer._wrap_model then doesn't wrap the model and no gradients are
    # averaged; with tensor or pipeline parallelism, HybridParallelOptimizer shards states without being asked.
    if given > 1 and not parallel.sharding:
        problems.append(
            f"--sharding_parallel_degree {given} needs --sharding stage1, stage2 or stage3 (data parallel needs "
            "neither)"
        )
    if world_size % (tensor * pipeline):
        degrees = (("--tensor_parallel_degree", tensor), ("--pipeline_parallel_degree", pipeline))
        asked = " x ".join(f"{flag} {degree}" for flag, degree in degrees if degree > 1)
        product = f" = {tensor * pipeline}" if min(tensor, pipeline) > 1 else ""
        if min(tensor, pipeline) == 1:
            choices = nearest(max(tensor, pipeline), list_divisors(world_size))
        else:  # the two nearest pairs, by ratio
            pairs = [(t, p) for t in list_divisors(world_size) for p in list_divisors(world_size // t)]
            pairs.sort(key=lambda pair: abs(math.log(pair[0] / tensor)) + abs(math.log(pair[1] / pipeline)))
            choices = " or ".join(f"{t} x {p}" for t, p in sorted(pairs[:2]))
        problems.append(f"{asked}{product} does not divide {world_size} ranks; nearest: {choices}")
    elif parallel.sharding and given > 1 and (left := world_size // (tensor * pipeline)) % given:
        problems.append(
            f"--sharding_parallel_degree {given} does not divide the {left} rank{'s' * (left > 1)} that tensor "
            f"{tensor} x pipeline {pipeline} leave of {world_size}; nearest: {nearest(given, list_divisors(left))}"
        )
    elif (left := world_size // (tensor * pipeline)) % max(1, parallel.expert_parallel_degree):
        problems.append(
            f"--expert_parallel_degree {parallel.expert_parallel_degree} does not divide the {left} "
            f"rank{'s' * (left > 1)} that tensor {tensor} x pipeline {pipeline} leave of {world_size}; nearest: "
            f"{nearest(parallel.expert_parallel_degree, list_divisors(left))}"
        )
    return problems


def find_option_problems(config: RunConfig, plan: ParallelPlan) -> Iterator[str]:
    """Conflicts between a plan and options of other sections."""
    # Trainer._wrap_model: "Sharding stage 2 / Sharding stage 3 main grad is not compatible with dp for now." (Under a
    # pipeline, stage 2 is stage 1 to the Trainer, and may.)
    if config.precision.amp_master_grad and plan.sharding_strategy in ("gradients", "parameters") and plan.data > 1:
        yield (
            f"--amp_master_grad with --sharding stage{plan.stage} needs data 1, and these degrees make it {plan.data}; "
            f"nearest: --sharding_parallel_degree {plan.replicas}, or --sharding stage1"
        )
    # The ranks skip a step with an infinite gradient; Paddle's GradScaler does not tell data-parallel ranks.
    if plan.expert > 1 and config.precision.fp16:
        yield (
            f"--expert_parallel_degree {plan.expert} can't be combined with --fp16, whose skipped steps would differ "
            "among the ranks; nearest: --bf16"
        )
    # These fuse gradients, or states, of parameters that all ranks are supposed to have.
    fusing = [*config.parallel.sharding_parallel_config.split(), *config.parallel.pipeline_parallel_config.split()]
    fusing = [word for word in fusing if word.endswith(("overlap", "fusion")) or word == "split_param"]
    if plan.expert > 1 and fusing:
        yield f"--expert_parallel_degree {plan.expert} can't be combined with {', '.join(fusing)}. Drop one of the two"
    # Prompts differ in length (see RunConfig.sequence_length).
    generating = "--eval_prompts" if config.evaluation.eval_prompts else ""
    generating = "--do_generation" if config.generates_answers else generating
    if plan.sequence_parallel and generating:
        yield (
            f"{generating} can't be combined with --sequence_parallel, under which layers accept only one "
            "sequence length. Drop one of the two"
        )
    # PipelineParallelWithInterleave: "cache should be enabled for pipeline with interleave".
    if plan.virtual_pipeline > 1 and plan.pipeline > 1:
        if config.varies_in_length:
            yield (
                f"--virtual_pp_degree {plan.virtual_pipeline}: Fleet's interleaved schedule needs batches of equal "
                "shape, but fine-tuning pads each to its own longest example; nearest: 1"
            )
        elif "disable_p2p_cache_shape" in config.parallel.pipeline_parallel_config:
            yield (
                f"--virtual_pp_degree {plan.virtual_pipeline} can't be combined with --pipeline_parallel_config "
                "disable_p2p_cache_shape (Fleet's interleaved schedule needs that cache). Drop one of the two"
            )


# rules that need neither configuration nor model


def find_plan_problems(plan: ParallelPlan) -> Iterator[str]:
    """Problems of a plan that don't depend on the model."""
    # TrainingArguments: "pipeline parallel is not compatible for sharding stage2 or stage3". Stage 2 is done by
    # parallel.sharded_gradients.
    if plan.stage == 3 and plan.pipeline > 1:
        yield (
            f"--sharding stage3 can't be combined with --pipeline_parallel_degree {plan.pipeline}: Fleet does not "
            "support it, and each micro-batch would gather the parameters of its stage twice, forward and backward; "
            "nearest: --sharding stage2"
        )
    if plan.expert > 1 and plan.stage > 1:
        yield (
            f"--sharding stage{plan.stage} can't be combined with --expert_parallel_degree {plan.expert}: an expert is "
            "on some of the sharding ranks only; nearest: --sharding stage1"
        )
    stages, chunks, count = plan.pipeline, plan.virtual_pipeline, plan.micro_batches
    if chunks == 1:
        return
    if stages <= 2:  # PipelineParallelWithInterleave._check_sanity: "virtual pipeline must run under pp degree > 2"
        yield f"--virtual_pp_degree {chunks} needs --pipeline_parallel_degree above 2 (Fleet's rule); got {stages}"
    # fleet.distributed_model: PipelineParallelWithInterleave from 2 x stages on (remainders are allowed), before that
    # PipelineParallelWithInterleaveFthenB, which asserts a multiple of the stages; fewer than stages is a ValueError.
    elif count != stages and count < 2 * stages:
        yield (
            f"--gradient_accumulation_steps {count}: with --virtual_pp_degree {chunks}, a pipeline of {stages} stages "
            f"takes {stages} micro-batches or at least {2 * stages}; nearest: {nearest(count, (stages, 2 * stages))}"
        )


# rules that span plan and model


def find_slicing_problems(config: RunConfig, plan: ParallelPlan, sizes: ModelSizes) -> list[str]:
    """Stage 3 must not shard the norms (of hidden_size elements) if sequence parallelism sums their gradients.

    GroupShardedStage3 takes away the gradient of a sharded parameter after every micro-batch, but
    register_sequence_parallel_allreduce_hooks sums it over the tensor ranks only after the last one.
    """
    if plan.sharding_strategy != "parameters" or not plan.sequence_parallel:
        return []
    smallest = config.parallel.stage3_min_elements
    if smallest is None or smallest >= sizes.hidden:
        return []
    return [
        f"--stage3_min_elements {smallest:,} with --sequence_parallel would shard norms of {sizes.hidden:,} elements, "
        f"whose gradients are summed over the tensor ranks; nearest: {sizes.hidden:,}"
    ]


def check_plan(plan: ParallelPlan, sizes: ModelSizes, seq_length: int) -> list[str]:
    """Check that a plan fits a model.

    Returns:
        Notes for the log.

    Raises:
        ConfigError: lists every problem, with the flag, the numbers and the nearest legal values.
    """
    problems = [problem for rule in _MODEL_RULES for problem in rule(plan, sizes, seq_length)]
    refuse([*find_plan_problems(plan), *problems], plan.world_size)
    sizes_of_stages = [len(chunk) for chunk in cut_layers(sizes.num_layers, plan.pipeline, plan.virtual_pipeline)]
    if len(set(sizes_of_stages)) > 1:
        return [
            f"--pipeline_parallel_degree {plan.pipeline} does not divide num_hidden_layers {sizes.num_layers}: the "
            f"stages hold {', '.join(map(str, sizes_of_stages))} layers, and the smaller ones wait for the larger ones"
        ]
    return []


def _find_missing_layers(plan: ParallelPlan, sizes: ModelSizes, seq_length: int) -> Iterator[str]:
    wanted = (
        ("tensor_parallel", plan.tensor > 1, f"--tensor_parallel_degree {plan.tensor}", "tensor-parallel layers"),
        ("pipeline", plan.pipeline > 1, f"--pipeline_parallel_degree {plan.pipeline}", "pipeline class"),
        ("sequence_parallel", plan.sequence_parallel, "--sequence_parallel", "sequence-parallel layers"),
    )
    for attribute, used, flag, what in wanted:
        if used and not getattr(FAMILIES.get(sizes.family), attribute, False):
            yield f"{flag}: {explain_missing(sizes.family, attribute, what)}; drop the flag"


def _find_indivisible_sizes(sizes: ModelSizes, tensor: int) -> Iterator[str]:
    if sizes.heads % tensor:  # a rank computes whole heads
        yield f"num_attention_heads {sizes.heads}"
    if sizes.kv_heads % tensor:
        yield f"num_key_value_heads {sizes.kv_heads}"
    # ColumnParallelLinear asserts out_features % world_size == 0, RowParallelLinear in_features.
    if sizes.hidden % tensor:
        yield f"hidden_size {sizes.hidden:,}"
    if sizes.intermediate % tensor:
        yield f"intermediate_size {sizes.intermediate:,}"
    # VocabParallelEmbedding asserts num_embeddings % world_size == 0.
    if sizes.vocab % tensor:
        yield f"vocab_size {sizes.vocab:,}"
    if sizes.experts and sizes.expert_intermediate % tensor:
        yield f"moe_intermediate_size {sizes.expert_intermediate:,}"


def _check_tensor_degree(plan: ParallelPlan, sizes: ModelSizes, seq_length: int) -> Iterator[str]:
    legal = [n for n in list_divisors(plan.world_size // plan.pipeline) if not any(_find_indivisible_sizes(sizes, n))]
    for size in _find_indivisible_sizes(sizes, plan.tensor):
        yield f"--tensor_parallel_degree {plan.tensor} does not divide {size}; nearest: {nearest(plan.tensor, legal)}"


def _check_expert_degree(plan: ParallelPlan, sizes: ModelSizes, seq_length: int) -> Iterator[str]:
    if plan.expert > 1 and not sizes.experts:
        yield f"--expert_parallel_degree {plan.expert}: {sizes.family} has no experts to divide; drop the flag"
    elif plan.expert > 1 and sizes.experts % plan.expert:
        legal = [n for n in list_divisors(plan.replicas) if sizes.experts % n == 0]
        yield (
            f"--expert_parallel_degree {plan.expert} does not divide the {sizes.experts} experts of a layer; nearest: "
            f"{nearest(plan.expert, legal)}"
        )


def _has_layers_everywhere(num_layers: int, stages: int, chunks: int = 1) -> bool:
    try:
        return all(cut_layers(num_layers, stages, chunks))
    except ValueError:
        return False


def _check_stages(plan: ParallelPlan, sizes: ModelSizes, seq_length: int) -> Iterator[str]:
    stages, chunks, layers = plan.pipeline, plan.virtual_pipeline, sizes.num_layers
    if _has_layers_everywhere(layers, stages, chunks):
        return
    legal_chunks = [n for n in range(1, layers + 1) if _has_layers_everywhere(layers, stages, n)]
    if chunks > 1 and legal_chunks:
        yield (
            f"--pipeline_parallel_degree {stages} x --virtual_pp_degree {chunks} = {stages * chunks} does not divide "
            f"num_hidden_layers {layers}; nearest --virtual_pp_degree: {nearest(chunks, legal_chunks)}"
        )
        return
    legal = [n for n in list_divisors(plan.world_size // plan.tensor) if _has_layers_everywhere(layers, n)]
    yield (
        f"--pipeline_parallel_degree {stages}: with num_hidden_layers {layers}, Paddle leaves a stage without layers; "
        f"nearest: {nearest(stages, legal)}"
    )


def _check_sequence_length(plan: ParallelPlan, sizes: ModelSizes, seq_length: int) -> Iterator[str]:
    # sequence_parallel_utils.scatter: "Input sequence length can't be divided exactly by sequence parallelism". It
    # scatters batch x sequence. The sequence itself must be divisible, because a batch may have a single sample.
    if plan.sequence_parallel and seq_length % plan.tensor:
        lower = seq_length - seq_length % plan.tensor
        choices = nearest(seq_length, [n for n in (lower, lower + plan.tensor) if n])
        yield (
            f"--sequence_parallel: sequences of {seq_length:,} tokens (--max_seq_length; --src_length + "
            f"--tgt_length or --packing_length) are not divisible by --tensor_parallel_degree {plan.tensor}; nearest: "
            f"{choices}"
        )


_MODEL_RULES: tuple[Rule, ...] = (
    _find_missing_layers,
    _check_tensor_degree,
    _check_expert_degree,
    _check_stages,
    _check_sequence_length,
)
