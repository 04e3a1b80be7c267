"""The fine-tuning scripts: published commands, and variables that override recipes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT
from oarlock.config import FinetuneConfig, load_config
from support.launch_scripts import parse_flags, parse_printed_command, run_script
from support.published_commands import ADAPTER, COMMAND_2, COMMAND_5, PUBLISHED

ENTRYPOINT = str(ROOT / "llm" / "finetune_generation.py")
# script -> the published command behind the entrypoint, and the GPUs of its launcher
SCRIPTS = {
    "finetune_full_tp4.sh": (COMMAND_2, "0,1,2,3"),
    "finetune_lora.sh": (PUBLISHED["lora_7b"], None),
    "finetune_qlora.sh": (f"{PUBLISHED['lora_7b']} --qlora", None),
    "finetune_prefix.sh": (PUBLISHED["prefix_7b"], None),
    "finetune_p_tuning.sh": (f"{ADAPTER} --learning_rate 1e-3 --p_tuning --p_tuning_hidden_size 1024", None),
    "finetune_pp.sh": (COMMAND_5, "4,5,6,7"),
    "finetune_instruction.sh": (PUBLISHED["instruction_7b"], "0,1,2,3"),
}


def dry_run(folder: Path, script: str, *words: str, **variables: str) -> tuple[Any, FinetuneConfig]:
    """Flags of Paddle's launcher (None without it), and the configuration."""
    found = parse_printed_command(script, folder, *words, **variables)
    assert found[:2] == [sys.executable, "-u"]
    position = found.index(ENTRYPOINT)
    launcher = found[2:position]
    assert launcher[:2] in ([], ["-m", "paddle.distributed.launch"])
    config = load_config(FinetuneConfig, [*found[position + 1 :], "--model_type", "llama"]).config
    return parse_flags(launcher[2:]) if launcher else None, config


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_runs_the_published_command(tmp_path, script):
    published, gpus = SCRIPTS[script]
    launcher, config = dry_run(tmp_path, script)
    assert launcher == (gpus and {"gpus": gpus, "log_dir": "log"})
    flags = [*shlex.split(published), "--device", "gpu", "--model_type", "llama"]
    flags += ["--validation_split", "0.02"]  # a recipe's own, for data without a dev file
    assert config == load_config(FinetuneConfig, flags).config


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_named_script_is_three_lines(script):
    lines = (ROOT / "scripts" / script).read_text().splitlines()
    assert len(lines) <= 4 and "finetune.sh" in lines[-1], "what all share is in finetune.sh"


@pytest.mark.parametrize("script", ["finetune_lora.sh", "finetune_pp.sh"])
def test_variables_and_flags_override_the_recipe(tmp_path, script):
    launcher, config = dry_run(
        tmp_path, script, "--learning_rate=1e-5", "--seed", "7",
        MODEL="my models/it's", DATA="my data", OUTPUT="out put", GPUS="2,5", OVERWRITE="0", LOG_DIR="logs",
    )  # fmt: skip
    assert launcher == {"gpus": "2,5", "log_dir": "logs"}
    assert config.model.model_name_or_path == "my models/it's" and config.data.dataset_name_or_path == "my data"
    assert config.checkpoint.output_dir == "out put" and not config.checkpoint.overwrite_output_dir
    assert config.schedule.learning_rate == 1e-5 and config.runtime.seed == 7


def test_another_recipe(tmp_path):
    config = dry_run(tmp_path, "finetune_lora.sh", RECIPE="lora_70b", GPUS="4")[1]
    assert config.parallel.tensor_parallel_degree == 4 and "70b" in config.model.model_name_or_path
    own = tmp_path / "own.yaml"
    own.write_text(f"include: {ROOT}/configs/recipes/lora_7b.yaml\nr: 3\n")
    assert dry_run(tmp_path, "finetune_lora.sh", RECIPE=str(own))[1].method.r == 3
    launcher, config = dry_run(tmp_path, "finetune.sh", "full_13b", "--seed", "7")
    assert launcher["gpus"] == "0,1,2,3,4,5,6,7", "all that can be seen"
    assert "13b" in config.model.model_name_or_path and config.runtime.seed == 7


def test_wrong_recipes_are_named(tmp_path):
    for script, words, variables in (
        ("finetune_lora.sh", [], {"RECIPE": "lora_8b"}),
        ("finetune.sh", ["lora_8b"], {}),
    ):
        result = run_script(script, tmp_path, *words, **variables)
        assert result.returncode == 2 and not result.stdout
        assert "lora_8b: No such file or recipe; did you mean lora_7b?" in result.stderr
    result = run_script("finetune.sh", tmp_path)
    assert result.returncode == 2 and "usage: bash scripts/finetune.sh RECIPE [FLAGS]" in result.stderr


def test_scripts_on_the_cpu(tmp_path):
    launcher, config = dry_run(tmp_path, "finetune_instruction.sh", DEVICE="cpu", MODEL="small")
    assert launcher["nproc_per_node"] == "4" and config.runtime.device == "cpu"
    assert "DEVICE=cpu needs MODEL=" in run_script("finetune_lora.sh", tmp_path, DEVICE="cpu").stderr
    for words, command in ((["finetune_lora.sh"], "finetune_lora.sh"), (["finetune.sh", "r"], "finetune.sh r")):
        (tmp_path / "r").write_text("do_train: true\n")
        result = run_script(words[0], tmp_path, *words[1:])
        assert f"bash scripts/{command} --max_steps 5 --warmup_steps 1" in result.stderr


def test_several_nodes_of_one_gpu_need_the_launcher(tmp_path):
    launcher, _ = dry_run(tmp_path, "finetune_lora.sh", NNODES="2", MASTER="10.0.0.1:29500", NODE_RANK="1")
    assert launcher["nnodes"] == "2" and launcher["gpus"] == "0"
