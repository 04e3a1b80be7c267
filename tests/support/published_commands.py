"""The published commands, and configurations for tests."""

from __future__ import annotations

import pytest

from oarlock.config import PretrainConfig, load_config
from oarlock.errors import ConfigError

DO = ("--do_train",)


def problems(*words: str, kind: type = PretrainConfig) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(kind, [*DO, *words])
    return str(error.value)


COMMAND_1 = """
--model_type "llama" --model_name_or_path "facebook/llama-7b"
--tokenizer_name_or_path "facebook/llama-7b" --input_dir "./data" --output_dir "output/llama_hybid"
--split 949,50,1 --max_seq_length 2048 --per_device_train_batch_size 1 --per_device_eval_batch_size 1
--use_flash_attention 1 --use_fused_rms_norm 0 --fp16 --fp16_opt_level "O2" --scale_loss 1024
--learning_rate 0.00001 --min_learning_rate 0.000005 --lr_scheduler_type "cosine" --max_steps 10000
--save_steps 5000 --weight_decay 0.01 --warmup_ratio 0.01 --max_grad_norm 1.0 --logging_steps 20
--dataloader_num_workers 1 --sharding "stage2" --eval_steps 1000 --report_to "visualdl" --disable_tqdm true
--continue_training 1 --recompute 1 --do_train --do_eval --device "gpu"
"""
COMMAND_2 = """
--model_name_or_path facebook/llama-7b --do_train --do_eval --num_train_epochs 1
--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --tensor_parallel_degree 4
--overwrite_output_dir --output_dir ./checkpoints/ --logging_steps 10 --fp16 --fp16_opt_level O2
--gradient_accumulation_steps 32 --recompute --learning_rate 3e-5 --lr_scheduler_type linear
--max_grad_norm 1.0 --warmup_steps 20
"""
COMMAND_5 = """
--model_name_or_path __internal_testing__/tiny-random-llama --do_train --do_eval --num_train_epochs 1
--dataloader_num_workers 1 --gradient_accumulation_steps 16 --per_device_train_batch_size 1
--per_device_eval_batch_size 16 --tensor_parallel_degree 2 --pipeline_parallel_degree 2
--pipeline_parallel_config "disable_p2p_cache_shape" --overwrite_output_dir --output_dir ./checkpoints/
--logging_steps 1 --disable_tqdm 1 --eval_steps 100 --eval_with_do_generation 0 --fp16 0 --fp16_opt_level O2
--recompute 0 --learning_rate 3e-5 --lr_scheduler_type linear --max_grad_norm 1.0 --warmup_steps 20
"""

# recipe -> the published command after its entrypoint
ONE_CARD = COMMAND_2.replace("--tensor_parallel_degree 4", "")
ADAPTER = f"{ONE_CARD} --num_train_epochs 2 --gradient_accumulation_steps 4"
PUBLISHED = {
    "pretrain_7b": COMMAND_1,
    "full_7b": COMMAND_2,
    "lora_7b": f"{ADAPTER} --learning_rate 3e-4 --lora True --r 8",
    "prefix_7b": f"{ADAPTER} --learning_rate 3e-2 --prefix_tuning True --num_prefix_tokens 64",
    "full_pipeline_7b": COMMAND_5,
    "instruction_7b": f"{COMMAND_2} --instruction_generation",
}
