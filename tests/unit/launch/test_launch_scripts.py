"""The pretraining scripts, and how all launch scripts treat their variables."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT
from oarlock.config import PretrainConfig, load_config
from support.launch_scripts import SCRIPTS, parse_flags, parse_printed_command, run_script

ENTRYPOINT = str(ROOT / "llm" / "run_pretrain.py")
PRETRAIN = ("run_trainer.sh", "run_trainer_tp4pp2.sh")
# Shell syntax that must never be executed.
HOSTILE = (
    'it\'s $(touch RUN) "x"',
    "`touch RUN`; touch RUN\n&& touch RUN",
    "-x",
    "$HOME *\t\u202e é",
    "a}b{a,b}~!x\\#",
)

# The published commands: with sharding stage 2, and the 4D one, which shares the values that were not published.
SHARED = """
--model_type llama --model_name_or_path facebook/llama-7b --tokenizer_name_or_path facebook/llama-7b
--input_dir ./data --split 949,50,1 --max_seq_length 2048 --per_device_train_batch_size 1
--use_flash_attention 1 --use_fused_rms_norm 0 --fp16 --fp16_opt_level O2 --learning_rate 0.00001
--lr_scheduler_type cosine --max_steps 10000 --save_steps 5000 --weight_decay 0.01 --warmup_ratio 0.01
--max_grad_norm 1.0 --dataloader_num_workers 1 --eval_steps 1000 --report_to visualdl --disable_tqdm true
--continue_training 1 --recompute 1 --do_train --do_eval --device gpu
"""
STAGE_2 = f"""{SHARED} --output_dir output/llama_hybid --per_device_eval_batch_size 1 --scale_loss 1024
--min_learning_rate 0.000005 --logging_steps 20 --sharding stage2
"""
TP4_PP2 = f"""{SHARED} --output_dir output/llama_4d --gradient_accumulation_steps 4 --per_device_eval_batch_size 4
--scale_loss 512 --tensor_parallel_degree 4 --pipeline_parallel_degree 2 --virtual_pp_degree 1 --sequence_parallel 0
--sharding stage1 --min_learning_rate 0.000001 --logging_steps 10
"""


def split(words: list[str]) -> tuple[dict[str, str], PretrainConfig]:
    """Flags of Paddle's launcher, and the configuration of the ranks."""
    assert words[:4] == [sys.executable, "-u", "-m", "paddle.distributed.launch"]
    position = words.index(ENTRYPOINT)
    return parse_flags(words[4:position]), load_config(PretrainConfig, words[position + 1 :]).config


@pytest.mark.parametrize("path", [*sorted(SCRIPTS.glob("*.sh")), SCRIPTS / "launch.slurm"], ids=lambda path: path.name)
def test_scripts_are_valid_bash(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    if path.name.startswith(("run_", "finetune", "pretrain")):
        assert os.access(path, os.X_OK)


@pytest.mark.parametrize(
    ("script", "published", "log"),
    [
        ("run_trainer.sh", STAGE_2, "output/llama_hybid_log"),
        ("run_trainer_tp4pp2.sh", TP4_PP2, "output/llama_4d_log"),
    ],
)
def test_on_8_gpus_the_script_runs_the_published_command(tmp_path, script, published, log):
    launcher, config = split(parse_printed_command(script, tmp_path, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7"))
    assert launcher == {"gpus": "0,1,2,3,4,5,6,7", "log_dir": log}
    expected = load_config(PretrainConfig, shlex.split(published)).config
    # The published commands name the model's own tokenizer, which is the default.
    model = dataclasses.replace(expected.model, tokenizer_name_or_path=None)
    assert config == dataclasses.replace(expected, model=model)


def test_32_gpus_on_4_nodes_use_the_4d_plan(tmp_path):
    variables = {"NNODES": "4", "MASTER": "10.0.0.1:29500"}
    launcher, config = split(parse_printed_command("run_trainer_tp4pp2.sh", tmp_path, NODE_RANK="0", **variables))
    assert launcher == {
        "gpus": "0,1,2,3,4,5,6,7", "nnodes": "4", "master": "10.0.0.1:29500", "rank": "0", "host": "10.0.0.1",
        "log_dir": "output/llama_4d_log/node-0",
    }  # fmt: skip
    expected = load_config(PretrainConfig, shlex.split(TP4_PP2)).config
    changed = {"sharding": "stage2", "sharding_parallel_degree": 2}
    assert config.parallel == dataclasses.replace(expected.parallel, **changed)
    others = split(parse_printed_command("run_trainer_tp4pp2.sh", tmp_path, NODE_RANK="3", **variables))
    assert others[0]["rank"] == "3" and others[1] == config


def test_the_degrees_are_variables(tmp_path):
    variables = {"TP": "2", "PP": "1", "SHARDING_DEGREE": "4", "SHARDING": "stage1", "DRY_RUN": "1"}
    result = run_script("run_trainer_tp4pp2.sh", tmp_path, **variables, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    assert "launch: 8 ranks: data 1 x sharding 4 (stage1) x tensor 2 x pipeline 1" in result.stderr
    parallel = split(shlex.split(result.stdout))[1].parallel
    assert (parallel.tensor_parallel_degree, parallel.pipeline_parallel_degree) == (2, 1)
    assert (parallel.sharding, parallel.sharding_parallel_degree) == ("stage1", 4)
    own = split(parse_printed_command("run_trainer.sh", tmp_path, TP="2"))[1]
    assert own.parallel.tensor_parallel_degree == -1, "the published command has none"


@pytest.mark.parametrize("script", PRETRAIN)
def test_variables_and_flags_override_the_recipe(tmp_path, script):
    launcher, config = split(
        parse_printed_command(
            script, tmp_path, "--max_steps", "20", "--learning_rate=3e-4", "--no_do_eval", "--seed", "7",
            MODEL="my models/it's", TOKENIZER="tok", DATA="1 a 2 b", OUTPUT="out put", GPUS="2,5", TP="2", PP="1",
            MODEL_TYPE="qwen2", MAX_RESTART="3",
        )
    )  # fmt: skip
    assert launcher == {"gpus": "2,5", "max_restart": "3", "log_dir": "out put_log"}
    assert config.model.model_name_or_path == "my models/it's" and config.model.tokenizer_name_or_path == "tok"
    assert config.model.model_type == "qwen2"
    assert config.data.input_dir == "1 a 2 b" and config.checkpoint.output_dir == "out put"
    assert config.schedule.max_steps == 20 and config.schedule.learning_rate == 3e-4 and config.runtime.seed == 7
    assert not config.evaluation.do_eval
    own = split(parse_printed_command(script, tmp_path, MODEL="m"))[1]
    assert own.model.tokenizer_name_or_path == "m"


@pytest.mark.parametrize("script", PRETRAIN)
def test_a_rehearsal_on_the_cpu(tmp_path, script):
    cpu = {"DEVICE": "cpu", "MODEL": "small", "GPUS": "8"}
    launcher, config = split(parse_printed_command(script, tmp_path, "--max_steps", "3", **cpu))
    assert launcher["nproc_per_node"] == "8" and "gpus" not in launcher
    assert config.runtime.device == "cpu" and config.schedule.max_steps == 3
    assert config.data.input_dir is None, "no ./data: the embedded text"
    assert split(parse_printed_command(script, tmp_path, **cpu, DATA="mine"))[1].data.input_dir == "mine"
    assert split(parse_printed_command(script, tmp_path, **cpu, DATA=""))[1].data.input_dir is None
    (tmp_path / "data").mkdir()
    assert split(parse_printed_command(script, tmp_path, **cpu))[1].data.input_dir == "./data"


def test_another_recipe_of_pretraining(tmp_path):
    launcher, config = split(parse_printed_command("pretrain.sh", tmp_path, "pretrain_70b", "--seed", "3"))
    assert launcher["log_dir"] == "output/pretrain_log" and config.checkpoint.output_dir == "output/pretrain"
    assert config.parallel.tensor_parallel_degree == 8 and config.runtime.seed == 3


@pytest.mark.parametrize("script", PRETRAIN)
def test_without_a_gpu_the_cpu_command_is_suggested(tmp_path, script):
    result = run_script(script, tmp_path)
    assert result.returncode == 2 and not result.stdout
    assert "no NVIDIA GPU here (CUDA_VISIBLE_DEVICES is empty)" in result.stderr
    (told,) = re.findall(rf"^  (DEVICE=cpu .* bash scripts/{script}) (.*)$", result.stderr, re.MULTILINE)
    variables = dict(word.split("=", 1) for word in told[0].split() if "=" in word)
    config = split(parse_printed_command(script, tmp_path, *told[1].split(), **variables))[1]
    assert config.runtime.device == "cpu" and config.schedule.max_steps == 5


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DEVICE": "cpu"}, "DEVICE=cpu needs MODEL="),
        ({"GPUS": "many"}, "GPUS (--gpus) must be a list"),
        ({"GPUS": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "can't be divided by tensor 4 x pipeline 2 = 8"),
        ({"TP": "a[$(touch RUN)]"}, "--tp: must be a whole number"),
        ({"NNODES": "$(touch RUN)"}, "--nnodes: must be a whole number"),
        ({"PYTHON": "/nowhere/python"}, "/nowhere/python"),
    ],
)
def test_wrong_variables_are_named(tmp_path, variables, expected):
    result = run_script("run_trainer_tp4pp2.sh", tmp_path, **variables)
    assert result.returncode in (2, 127) and expected in result.stderr and not result.stdout
    assert not list(tmp_path.rglob("RUN"))


@pytest.mark.parametrize("script", [*PRETRAIN, "finetune_lora.sh"])
@pytest.mark.parametrize("value", HOSTILE)
def test_values_are_passed_verbatim(tmp_path, script, value):
    names = ("MODEL", "DATA", "OUTPUT", "TOKENIZER", "LOG_DIR", "MODEL_TYPE")
    words = parse_printed_command(
        script, tmp_path, "--note", value, DEVICE="cpu", GPUS="2", TP="1", PP="2", **dict.fromkeys(names, value)
    )
    assert words[-2:] == ["--note", value] and words.count(value) >= 4, words
    assert not list(tmp_path.rglob("RUN"))


def test_the_python_of_the_repository_is_preferred(tmp_path):
    copied = tmp_path / "a copy"
    for folder in ("scripts", "configs"):
        shutil.copytree(ROOT / folder, copied / folder)
    (copied / "llm").symlink_to(ROOT / "llm")
    script = copied / "scripts" / "run_trainer.sh"
    (tmp_path / "bin").mkdir()
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    for python in (tmp_path / "bin" / "python", copied / ".venv" / "bin" / "python"):
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f'#!/bin/sh\necho "{python}"\n')
        python.chmod(0o755)
        assert run_script(script, tmp_path, PYTHON="", PATH=path).stdout.strip() == str(python)
    assert parse_printed_command(script, tmp_path, PYTHON=sys.executable)[0] == sys.executable


def test_a_dry_run_starts_nothing(tmp_path):
    parse_printed_command("run_trainer.sh", tmp_path)
    assert not list(tmp_path.iterdir())
    result = run_script("run_trainer.sh", tmp_path, DRY_RUN="0")
    assert result.returncode == 2 and "no NVIDIA GPU" in result.stderr, "a run needs the GPUs"
