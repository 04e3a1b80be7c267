"""The three walks: title, most hops, and the places from an entrypoint to where a behaviour happens."""

from __future__ import annotations

from structure.hops import Step

_STAGE_2_UNDER_A_PIPELINE = [
    Step("api/training.py:run_training"),
    Step("train/pretrain.py:pretrain"),
    Step("train/pretrain.py:_pretrain"),
    Step("train/setup.py:start"),
    Step("parallel/make_plan.py:make_plan"),
    Step("parallel/plan.py:ParallelPlan.sharding_strategy"),
    Step("train/run_training.py:make_trainer"),
    Step("train/trainer.py:OarlockTrainer"),
    Step("train/trainer.py:OarlockTrainer._wrap_model"),
    Step("train/group_sharding.py:shard_pipeline_gradients"),
    Step("parallel/sharded_gradients.py:ShardedGradients"),
    Step("parallel/sharded_gradients.py:ShardedGradients._send"),
]

_LORA = [
    Step("api/training.py:run_training"),
    Step("train/finetune.py:finetune"),
    Step("train/finetune.py:_finetune"),
    Step("peft/method.py:choose_method"),
    Step("peft/lora.py:LoRA.of"),
    Step("models/build.py:build_model"),
    Step("peft/lora.py:LoRA.attach"),
    Step("peft/method.py:initial_values"),
    Step("peft/method.py:fill_trained"),
    Step("train/run_training.py:make_trainer"),
    Step("train/trainer.py:OarlockTrainer"),
    Step("train/trainer.py:OarlockTrainer.create_optimizer"),
    Step("train/optim/optimizer.py:configure_optimizer"),
    Step("train/run_training.py:train"),
    Step("train/checkpoint/final_model.py:save_final_model"),
    Step("peft/adapter_folder.py:save_adapter"),
]

WALKS: dict[str, tuple[str, int, list[Step]]] = {
    "stage2_pipeline": ("--sharding stage2 with a pipeline", 8, _STAGE_2_UNDER_A_PIPELINE),
    "lora": ("--lora True --r 8", 12, _LORA),
}
