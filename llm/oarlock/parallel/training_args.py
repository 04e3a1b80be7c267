"""The one file that knows the names of PaddleNLP's TrainingArguments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paddlenlp.trainer import TrainingArguments

    from oarlock.config.schema import Config
    from oarlock.parallel.plan import ParallelPlan


def training_arguments(config: Config, plan: ParallelPlan) -> TrainingArguments:
    """Translate a configuration and its plan.

    Strategies for logging, evaluation and saving are off (the trainer decides, see OarlockTrainer._decide), and so is
    reporting (our callbacks do it). Building TrainingArguments calls fleet.init: everything that can be checked must
    have been before.
    """
    from paddlenlp.trainer import TrainingArguments

    batch, schedule, optimizer = config.batch, config.schedule, config.optimizer
    precision, parallel = config.precision, config.parallel
    return TrainingArguments(
        output_dir=config.checkpoint.output_dir,
        logging_dir=str(visualdl_dir(config)),
        do_train=config.evaluation.do_train,
        per_device_train_batch_size=batch.per_device_train_batch_size,
        per_device_eval_batch_size=batch.per_device_eval_batch_size,
        gradient_accumulation_steps=batch.gradient_accumulation_steps,
        dataloader_num_workers=batch.dataloader_num_workers,
        num_train_epochs=schedule.num_train_epochs,
        max_steps=schedule.max_steps,
        learning_rate=schedule.learning_rate,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm or 1.0,  # the clip itself is replaced, and 0 only measures
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_epsilon=optimizer.adam_epsilon,
        max_evaluate_steps=config.evaluation.max_evaluate_steps,
        evaluation_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to=["none"],
        disable_tqdm=True,
        fp16=precision.fp16,
        bf16=precision.bf16,
        fp16_opt_level=precision.fp16_opt_level,
        scale_loss=precision.scale_loss,
        amp_master_grad=precision.amp_master_grad,
        recompute=config.kernels.recompute,
        # Zeroed gradients are added to; freed ones are made by the backward pass, a read and two writes less.
        release_grads=plan.pipeline == 1 and plan.sharding <= 1,
        sharding=_sharding(plan),
        sharding_parallel_degree=plan.sharding if plan.sharding > 1 else -1,
        tensor_parallel_degree=plan.tensor if plan.tensor > 1 else -1,
        pipeline_parallel_degree=plan.pipeline if plan.pipeline > 1 else -1,
        sequence_parallel=plan.sequence_parallel,
        tensor_parallel_config=parallel.tensor_parallel_config,
        pipeline_parallel_config=_pipeline_switches(config),
        sharding_parallel_config=parallel.sharding_parallel_config,
        unified_checkpoint=True,  # never used (see train.saving), but only with it Fleet makes the groups of plain DP
        device=config.runtime.device or "cpu",
        seed=config.runtime.seed,
    )


def _sharding(plan: ParallelPlan) -> str:
    """Stage 2 under a pipeline is stage 1 to PaddleNLP: it refuses the pair (see parallel.sharded_gradients)."""
    if plan.sharding <= 1:
        return ""
    return "stage1" if plan.stage == 2 and plan.pipeline > 1 else f"stage{plan.stage}"


def _pipeline_switches(config: Config) -> str:
    """Fine-tuning batches have lengths of their own: the stages may not cache the shapes they send each other."""
    switches = config.parallel.pipeline_parallel_config.split()
    if hasattr(config.data, "src_length") and "disable_p2p_cache_shape" not in switches:
        switches.append("disable_p2p_cache_shape")
    return " ".join(switches)


def visualdl_dir(config: Config) -> Path:
    """Where VisualDL's files go."""
    return Path(config.logging.logging_dir or Path(config.checkpoint.output_dir) / "visualdl")
