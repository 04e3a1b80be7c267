"""PaddleNLP's TrainingArguments for a configuration and its plan. No other file knows their names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from oarlock.config.run_config import RunConfig
from oarlock.parallel.plan import ParallelPlan, ShardingStrategy

if TYPE_CHECKING:
    from paddlenlp.trainer import TrainingArguments


# PaddleNLP refuses stage 2 under a pipeline. It is given stage 1, and parallel.sharded_gradients shards the gradients.
_PADDLENLP_STAGE: dict[ShardingStrategy, str] = {
    "none": "",
    "optimizer": "stage1",
    "gradients_hooked": "stage1",
    "gradients": "stage2",
    "parameters": "stage3",
}


def make_training_arguments(config: RunConfig, plan: ParallelPlan) -> TrainingArguments:
    """Translate a configuration and its plan.

    PaddleNLP's strategies for logging, evaluation and saving are off, because OarlockTrainer decides when these are
    due. So is reporting, which Oarlock's reporters do. TrainingArguments call fleet.init when they are built, so do all
    checks before.
    """
    from paddlenlp.trainer import TrainingArguments

    batch, schedule, optimizer = config.batch, config.schedule, config.optimizer
    precision, parallel = config.precision, config.parallel
    pipeline_switches = parallel.pipeline_parallel_config.split()
    # The stages may not cache the shapes that they send each other if batches differ in length.
    if config.varies_in_length and "disable_p2p_cache_shape" not in pipeline_switches:
        pipeline_switches.append("disable_p2p_cache_shape")
    return TrainingArguments(
        output_dir=config.checkpoint.output_dir,
        logging_dir=str(find_visualdl_dir(config)),
        do_train=config.evaluation.do_train,
        per_device_train_batch_size=batch.per_device_train_batch_size,
        per_device_eval_batch_size=batch.per_device_eval_batch_size,
        gradient_accumulation_steps=batch.gradient_accumulation_steps,
        dataloader_num_workers=batch.dataloader_num_workers,
        num_train_epochs=schedule.num_train_epochs,
        max_steps=schedule.max_steps,
        learning_rate=schedule.learning_rate,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm or 1.0,  # any value: the trainer brings its own clip, where 0 means off
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
        # The backward pass adds to zeroed gradients but creates freed ones, which saves a read and two writes.
        release_grads=plan.pipeline == 1 and plan.sharding <= 1,
        sharding=_PADDLENLP_STAGE[plan.sharding_strategy],
        sharding_parallel_degree=plan.sharding if plan.sharding > 1 else -1,
        tensor_parallel_degree=plan.tensor if plan.tensor > 1 else -1,
        pipeline_parallel_degree=plan.pipeline if plan.pipeline > 1 else -1,
        sequence_parallel=plan.sequence_parallel,
        tensor_parallel_config=parallel.tensor_parallel_config,
        pipeline_parallel_config=" ".join(pipeline_switches),
        sharding_parallel_config=parallel.sharding_parallel_config,
        unified_checkpoint=True,  # never used, but without it Fleet makes no groups for plain data parallelism
        device=config.runtime.device or "cpu",
        seed=config.runtime.seed,
    )


def find_visualdl_dir(config: RunConfig) -> Path:
    """Folder of VisualDL's files."""
    return Path(config.logging.logging_dir or Path(config.checkpoint.output_dir) / "visualdl")
