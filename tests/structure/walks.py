"""The three walks: title, maximum number of hops, and the places from an entrypoint to where a behaviour happens."""

from __future__ import annotations

from structure.hops import Step

_STAGE_2_UNDER_A_PIPELINE = [
    Step("api/training.py:run_training"),
    Step("train/pretrain.py:pretrain"),
    Step("train/pretrain.py:_pretrain"),
    Step("train/setup.py:start_run"),
    Step("parallel/make_plan.py:make_plan"),
    Step("parallel/plan.py:ParallelPlan.sharding_strategy"),
    Step("train/run_training.py:make_trainer"),
    Step("train/trainer.py:OarlockTrainer"),
    Step("train/trainer.py:OarlockTrainer._wrap_model"),
    Step("train/group_sharding.py:shard_pipeline_gradients"),
    Step("parallel/sharded_gradients.py:ShardedGradients"),
    Step("parallel/sharded_gradients.py:ShardedGradients._reduce"),
]

_LORA = [
    Step("api/training.py:run_training"),
    Step("train/finetune.py:finetune"),
    Step("train/finetune.py:_finetune"),
    Step("peft/method.py:choose_method"),
    Step("peft/lora.py:LoRA.from_config"),
    Step("models/build.py:build_model"),
    Step("peft/lora.py:LoRA.attach"),
    Step("peft/method.py:initial_values"),
    Step("peft/method.py:fill_trained"),
    Step("train/run_training.py:make_trainer"),
    Step("train/trainer.py:OarlockTrainer"),
    Step("train/trainer.py:OarlockTrainer.create_optimizer"),
    Step("train/optim/optimizer.py:configure_optimizer"),
    Step("train/run_training.py:run_training"),
    Step("train/checkpoint/final_model.py:save_final_model"),
    Step("peft/adapter_folder.py:save_adapter"),
]

_CHAT_REQUEST = [
    Step("serve/front/process.py:Front"),
    Step("serve/front/http/server.py:guard_app"),
    Step("serve/front/http/guard.py:Guard.__call__"),
    Step("serve/front/openai/app.py:make_openai_app"),
    Step("serve/front/openai/app.py:_add_routes"),
    Step("serve/front/openai/schema.py:ChatRequest"),
    Step("serve/front/openai/schema.py:_Request._make_requests"),
    Step("serve/request.py:GenerationRequest"),
    Step("serve/request.py:GenerationRequest.check"),
    Step("serve/triton/client.py:TritonClient.generate"),
    Step("serve/triton/fields.py:write_request"),
    Step("triton_repository/models/oarlock/model.py:", wire="Triton"),
    Step("serve/triton/backend.py:StreamingModel.execute"),
    Step("serve/triton/backend.py:StreamingModel._submit"),
    Step("serve/triton/fields.py:read_request"),
    Step("serve/engine/engine.py:Engine.submit"),
    Step("serve/engine/loading.py:ServedModel.encode"),
    Step("serve/engine/loading.py:render_prompt"),
    Step("data/templates/chat_template.py:ChatTemplate.render_chat"),
    Step("serve/engine/running_request.py:RunningRequest"),
    Step("serve/engine/engine.py:Engine._admit", wire="_waiting"),
    Step("serve/engine/engine.py:Engine._step", wire="_running"),
    Step("serve/engine/engine.py:Engine._feed"),
    Step("serve/engine/fused_decoder.py:FusedDecoder.feed"),
    Step("ops/decoder.py:decoder_pass"),
    Step("serve/engine/running_request.py:RunningRequest.append_token"),
    Step("serve/engine/sampler.py:Sampler.choose"),
    Step("serve/engine/detokenize.py:Detokenizer.add"),
]

WALKS: dict[str, tuple[str, int, list[Step]]] = {
    "stage2_pipeline": ("--sharding stage2 with a pipeline", 8, _STAGE_2_UNDER_A_PIPELINE),
    "lora": ("--lora True --r 8", 12, _LORA),
    "chat_request": ("one chat request", 20, _CHAT_REQUEST),
}
