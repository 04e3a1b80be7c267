"""`oarlock rehearse` on the published commands, and its report of a difference."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
from ports import PortWatch

from helpers import ROOT, run_program
from oarlock.config.finetune import FinetuneConfig
from oarlock.config.pretrain import PretrainConfig
from oarlock.errors import ConfigError
from oarlock.parallel.launch_command import parse_command

COMMAND_1 = """python -u -m paddle.distributed.launch --gpus "0,1,2,3,4,5,6,7" --log_dir "output/llama_hybid_log"
  run_pretrain.py --model_type "llama" --model_name_or_path "facebook/llama-7b"
  --tokenizer_name_or_path "facebook/llama-7b" --input_dir "./data" --output_dir "output/llama_hybid"
  --split 949,50,1 --max_seq_length 2048 --per_device_train_batch_size 1 --per_device_eval_batch_size 1
  --use_flash_attention 1 --use_fused_rms_norm 0 --fp16 --fp16_opt_level "O2" --scale_loss 1024
  --learning_rate 0.00001 --min_learning_rate 0.000005 --lr_scheduler_type "cosine" --max_steps 10000
  --save_steps 5000 --weight_decay 0.01 --warmup_ratio 0.01 --max_grad_norm 1.0 --logging_steps 20
  --dataloader_num_workers 1 --sharding "stage2" --eval_steps 1000 --report_to "visualdl" --disable_tqdm true
  --continue_training 1 --recompute 1 --do_train --do_eval --device "gpu" """
COMMAND_2 = """python -u -m paddle.distributed.fleet.launch --gpus "0,1,2,3" finetune_generation.py
  --model_name_or_path facebook/llama-7b --do_train --do_eval --num_train_epochs 1
  --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --tensor_parallel_degree 4
  --overwrite_output_dir --output_dir ./checkpoints/ --logging_steps 10 --fp16 --fp16_opt_level O2
  --gradient_accumulation_steps 32 --recompute --learning_rate 3e-5 --lr_scheduler_type linear
  --max_grad_norm 1.0 --warmup_steps 20"""
COMMAND_5 = """python -u -m paddle.distributed.launch --gpus "4,5,6,7" finetune_generation.py
  --model_name_or_path __internal_testing__/tiny-random-llama --do_train --do_eval --num_train_epochs 1
  --dataloader_num_workers 1 --gradient_accumulation_steps 16 --per_device_train_batch_size 1
  --per_device_eval_batch_size 16 --tensor_parallel_degree 2 --pipeline_parallel_degree 2
  --pipeline_parallel_config "disable_p2p_cache_shape" --overwrite_output_dir --output_dir ./checkpoints/
  --logging_steps 1 --disable_tqdm 1 --eval_steps 100 --eval_with_do_generation 0 --fp16 0 --fp16_opt_level O2
  --recompute 0 --learning_rate 3e-5 --lr_scheduler_type linear --max_grad_norm 1.0 --warmup_steps 20"""


def command_7() -> str:
    """The command that the 4D script runs on 8 cards."""
    result = subprocess.run(
        ["bash", "scripts/run_trainer_tp4pp2.sh"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "DRY_RUN": "1", "GPUS": "8", "PYTHON": sys.executable},
    )  # fmt: skip
    return result.stdout


@pytest.mark.parametrize(
    ("command", "ranks", "steps"),
    [(COMMAND_1, 8, 3), (COMMAND_2, 4, 3), (COMMAND_5, 4, 5), ("7", 8, 3)],
    ids=["pretrain-sharding-8", "finetune-tensor-4", "pipeline-4", "tp4pp2-8"],
)
def test_published_commands_are_rehearsed(tmp_path, command, ranks, steps):
    words = shlex.split(command_7() if command == "7" else command)
    report = tmp_path / "report.json"
    with PortWatch() as ports:
        result = run_program("oarlock", "rehearse", "--steps", str(steps), "--json", str(report), "--", *words)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert not ports.found and len(ports.processes) > ranks
    assert "SAME as one process" in result.stdout
    found = json.loads(report.read_text())
    assert found["same"] and len(found["ranks"]) == ranks and len(found["one_process"]["losses"]) == steps
    whole = found["one_process"]
    plan = found["plan"]
    for rank in found["ranks"]:
        assert rank["parameter_bytes"] < 1.2 * whole["parameter_bytes"] / (plan["tensor"] * plan["pipeline"])
        if plan["stage"] == 2:
            assert rank["gradient_bytes"] < 2 * whole["gradient_bytes"] / plan["sharding"]
        assert rank["collectives"]


def test_a_plan_that_does_not_fit_the_full_size_model_is_refused(tmp_path):
    words = ["--ranks", "8", "--", "run_pretrain.py", "--model_name_or_path", "facebook/llama-7b", "--do_train"]
    result = run_program("oarlock", "rehearse", *words, "--sharding", "stage3", "--pipeline_parallel_degree", "2")
    assert (
        result.returncode == 2
        and "--sharding stage3 can't be combined with --pipeline_parallel_degree" in result.stderr
    )


def test_a_difference_is_reported_with_step_rank_and_tensor(tmp_path):
    """Rank 1 compares with another weight: the verdict names step, rank and tensor, and the exit code is 1."""
    code = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from oarlock.train.rehearsal import rank as rehearsal_rank
original = rehearsal_rank._Recorder._compare
def tampered(self, step):
    if step == 2 and rehearsal_rank.rank() == 1:
        parameter = dict(self.model.named_parameters())["llama.norm.weight"]
        parameter.set_value(parameter + 0.001)
    original(self, step)
rehearsal_rank._Recorder._compare = tampered
from oarlock.cli.main import main
main(sys.argv[2:])
"""
    script = tmp_path / "tampered.py"
    script.write_text(code)
    words = ["rehearse", "--steps", "3", "--ranks", "2", "--", "finetune_generation.py", "--do_train"]
    words += ["--model_name_or_path", "__internal_testing__/tiny-random-llama", "--tensor_parallel_degree", "2"]
    result = subprocess.run(
        [sys.executable, str(script), str(ROOT / "llm"), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 1, result.stderr
    assert "DIFFERS from one process: step 2, rank 1: llama.norm.weight differs by 0.001" in result.stdout


@pytest.mark.parametrize(
    ("words", "ranks", "kind"),
    [
        ("python -m paddle.distributed.launch --gpus=0,1,2 run_pretrain.py --do_train", 3, PretrainConfig),
        ("torchrun --nproc_per_node 2 --nnodes 2:4 llm/run_pretrain.py --do_train", 4, PretrainConfig),
        ("python finetune_generation.py --do_train", 5, FinetuneConfig),
        ("python -m paddle.distributed.launch --gpus 0,1 .venv/bin/oarlock pretrain --do_train", 2, PretrainConfig),
        ("python -m oarlock finetune lora_7b", 5, FinetuneConfig),
        ("lora_7b", 5, FinetuneConfig),
    ],
)
def test_launch_commands_are_parsed(words, ranks, kind):
    command = parse_command(shlex.split(words), None if "-m paddle" in words or "torchrun" in words else 5)
    assert command.num_ranks == ranks and isinstance(command.config, kind)


def test_missing_inputs_are_reported(tmp_path):
    with pytest.raises(ConfigError, match="how many ranks"):
        parse_command(["run_pretrain.py", "--do_train"], None)
    with pytest.raises(ConfigError, match="oarlock launch --dry_run"):
        parse_command(["oarlock", "launch", "--gpus", "4", "--tp", "2", "pretrain", "pretrain_7b"], None)
    with pytest.raises(ConfigError, match=r"give a launch command with run_pretrain\.py"):
        parse_command(["python", "something.py"], 2)
    yaml = tmp_path / "tune.yaml"
    yaml.write_text("do_train: true\nsrc_length: 64\n")
    assert isinstance(parse_command([str(yaml)], 2).config, FinetuneConfig)
