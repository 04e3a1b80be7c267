"""The fine-tuning scripts: the published commands, variables over the recipes, and one process without a launcher."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT
from oarlock.config import FinetuneConfig, load_config
from support.published_commands import COMMAND_2, COMMAND_5
from unit.config.test_recipes import ADAPTER, PUBLISHED
from unit.parallel.test_launch_scripts import Machine, options

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


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def split(words: list[str]) -> tuple[Any, FinetuneConfig]:
    """The launcher's options, if there is one, and the configuration (whose family the recipes name)."""
    position = words.index(ENTRYPOINT)
    launcher = words[:position]
    assert launcher[:2] in ([], ["-m", "paddle.distributed.launch"])
    config = load_config(FinetuneConfig, [*words[position + 1 :], "--model_type", "llama"]).config
    return options(launcher[2:]) if launcher else None, config


def dry_run(machine: Machine, script: str, *words: str, **variables: str) -> tuple[Any, FinetuneConfig]:
    result = machine.run(script, *words, DRY_RUN="1", **variables)
    assert result.returncode == 0, result.stderr
    found = shlex.split(result.stdout)
    assert found[:2] == [machine.environment["PYTHON"], "-u"]
    return split(found[2:])


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_is_the_published_command(machine: Machine, script: str) -> None:
    published, gpus = SCRIPTS[script]
    launcher, config = dry_run(machine, script)
    assert launcher == (gpus and {"gpus": gpus, "log_dir": "log"})
    flags = [*shlex.split(published), "--device", "gpu", "--model_type", "llama"]
    flags += ["--validation_split", "0.02"]  # a recipe's own, for data without a dev file
    assert config == load_config(FinetuneConfig, flags).config
    assert os.access(ROOT / "scripts" / script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS)
def test_variables_and_flags_go_over_the_recipe(machine: Machine, script: str) -> None:
    launcher, config = dry_run(
        machine, script, "--learning_rate=1e-5", "--seed", "7",
        MODEL="my models/it's", DATA="my data", OUTPUT="out put", GPUS="2,5", OVERWRITE="0", LOG_DIR="logs",
    )  # fmt: skip
    assert launcher["gpus"] == "2,5" and launcher["log_dir"] == "logs"
    assert config.model.model_name_or_path == "my models/it's" and config.data.dataset_name_or_path == "my data"
    assert config.checkpoint.output_dir == "out put" and not config.checkpoint.overwrite_output_dir
    assert config.schedule.learning_rate == 1e-5 and config.runtime.seed == 7


def test_another_recipe(machine: Machine) -> None:
    config = dry_run(machine, "finetune_lora.sh", RECIPE="lora_70b", GPUS="4")[1]
    assert config.parallel.tensor_parallel_degree == 4 and "70b" in config.model.model_name_or_path
    own = machine.work / "own.yaml"
    own.write_text(f"include: {ROOT}/configs/recipes/lora_7b.yaml\nr: 3\n")
    assert dry_run(machine, "finetune_lora.sh", RECIPE=str(own))[1].method.r == 3
    assert 'got "lora_8b"' in machine.error("finetune_lora.sh", RECIPE="lora_8b")


def test_on_the_cpu(tmp_path: Path) -> None:
    machine = Machine(tmp_path, gpus=0)
    launcher, config = dry_run(machine, "finetune_instruction.sh", DEVICE="cpu", MODEL="small")
    assert launcher["nproc_per_node"] == "4" and config.runtime.device == "cpu"
    assert "DEVICE=cpu needs MODEL=" in machine.error("finetune_lora.sh", DEVICE="cpu")
    assert "no NVIDIA GPU here" in machine.error("finetune_lora.sh")


def test_one_process_needs_no_launcher(machine: Machine) -> None:
    """It gets the signals itself, is started again when it fails, and no log of ranks is promised."""
    result = machine.run("finetune_lora.sh", MAX_RESTART="2", FAKE_CODES="1,1,7")
    assert result.returncode == 7 and "workerlog" not in result.stderr
    starts = machine.launched()
    assert len(starts) == 3 and "paddle.distributed.launch" not in starts[0]["words"]
    overwrites = [split(start["words"][1:])[1].checkpoint.overwrite_output_dir for start in starts]
    assert overwrites == [True, False, False]


def test_one_process_gets_the_signal(machine: Machine) -> None:
    process = machine.start(ROOT / "scripts/finetune_lora.sh", FAKE_DOES="start", MAX_RESTART="3")
    machine.wait_for("ready-*", 1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert "passing SIGTERM to 1 trainer(s)" in errors and len(machine.launched()) == 1
    assert process.returncode == 1, "the trainer's own code"


def test_several_nodes_of_one_gpu_need_the_launcher(machine: Machine) -> None:
    launcher, _ = dry_run(machine, "finetune_lora.sh", NNODES="2", MASTER="10.0.0.1:29500", NODE_RANK="1")
    assert launcher["nnodes"] == "2" and launcher["gpus"] == "0"
