"""Every recipe, and every fine-tuning script on the CPU, trains two steps of a tiny model.

The commands that the scripts print in a dry run are run one after another from one process that has imported Paddle
(warm_runs.py). One script runs as users start it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import ROOT, make_flags, make_tiny_model, read_rows
from oarlock.config import FinetuneConfig, load_config
from support.launch_scripts import parse_printed_command

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
# name -> number of processes, as with the GPUs of the published commands
SCRIPTS = {
    "finetune_full_tp4.sh": 4, "finetune_lora.sh": 1, "finetune_qlora.sh": 1, "finetune_prefix.sh": 1,
    "finetune_p_tuning.sh": 1, "finetune_pp.sh": 4, "finetune_instruction.sh": 4,
}  # fmt: skip
# As in the names of recipes and of adapters; all others train every weight.
METHODS = {"qlora": "lora", "lora": "lora", "prefix": "prefix", "p_tuning": "p_tuning"}
RECORDS = [{"instruction": "Say it.", "input": word, "output": word} for word in ("water", "fire", "sun", "moon")]
SMALLER = {
    "max_steps": 2, "warmup_steps": 0, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
    "logging_steps": 1, "report_to": "none", "max_evaluate_steps": 1, "dataloader_num_workers": 0, "disable_tqdm": 1,
    "num_threads": 1, "save_strategy": "no", "collective_timeout": 60, "learning_rate": 1e-3, "min_learning_rate": 0,
}  # fmt: skip
SMALLER_TUNING = SMALLER | {"src_length": 32, "tgt_length": 16, "p_tuning_hidden_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    make_tiny_model(folder / "model", num_key_value_heads=4)  # for four tensor ranks
    (folder / "data").mkdir()
    (folder / "data" / "train.json").write_text(json.dumps(RECORDS * 8))
    (folder / "data" / "dev.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return folder


def recipe_command(recipe: Path, folder: Path, corpus: Path, output: Path) -> list[str]:
    common = {"model_name_or_path": folder / "model", "output_dir": output, "device": "cpu"}
    if recipe.stem.startswith("pretrain"):
        program, more = "run_pretrain.py", SMALLER | {"input_dir": corpus, "split": "90,10,0", "max_seq_length": 32}
    else:
        program, more = "finetune_generation.py", SMALLER_TUNING | {"dataset_name_or_path": folder / "data"}
        if load_config(FinetuneConfig, [str(recipe)]).config.data.packing:
            more |= {"packing_length": 128}
    return [program, str(recipe), *make_flags(**(common | more))]


def script_command(name: str, folder: Path, output: Path) -> list[str]:
    """The command that a script starts on a machine without GPUs."""
    variables = {"DEVICE": "cpu", "MODEL": str(folder / "model"), "DATA": str(folder / "data"), "OUTPUT": str(output)}
    return parse_printed_command(name, folder, *make_flags(**SMALLER_TUNING), **variables)[1:]


@pytest.fixture(scope="module")
def results(folder, corpus) -> dict[str, dict[str, Any]]:
    spec = []
    for source in [*RECIPES, *SCRIPTS]:
        name = source.stem if isinstance(source, Path) else source
        own = folder / name
        own.mkdir()
        if isinstance(source, Path):
            words = recipe_command(source, folder, corpus, own / "out")
        else:
            words = script_command(source, folder, own / "out")
        spec.append({"name": name, "words": words, "folder": str(own)})
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, str(Path(__file__).with_name("warm_runs.py")), "spec.json", "out.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "out.json").read_text())


def check_trained(out: Path, name: str) -> None:
    """Check for two finite losses, an evaluation, and a model or an adapter of the method in the name."""
    found = read_rows(out / "metrics.jsonl")
    losses = [row["loss"] for row in found if "loss" in row]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert any("eval_loss" in row for row in found)
    method = next((method for method in METHODS if method in name), None)
    if method is None:
        assert (out / "model.safetensors").exists() and not (out / "adapter.json").exists()
    else:
        assert (out / "peft_model.safetensors").exists() and not (out / "model.safetensors").exists()
        saved = json.loads((out / "adapter.json").read_text())
        assert saved["method"] == METHODS[method]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(results, folder, recipe):
    result = results[recipe.stem]
    assert result["codes"] == [0], result["said"]
    check_trained(folder / recipe.stem / "out", recipe.stem)
    assert ("QLoRA: nf4 weights" in result["said"]) == recipe.stem.startswith("qlora")
    assert ("packing: " in result["said"]) == (recipe.stem == "full_70b")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_on_the_cpu(results, folder, name):
    result = results[name]
    assert result["codes"] == [0] * SCRIPTS[name], result["said"]
    check_trained(folder / name / "out", name)
    if name == "finetune_instruction.sh":
        assert "chat template: alpaca" in result["said"]


def test_every_script_is_tested():
    assert {path.name for path in (ROOT / "scripts").glob("finetune_*.sh")} == set(SCRIPTS)


def test_a_script_as_users_start_it(tmp_path, folder):
    """One process without a launcher; its exit code is that of the trainer."""
    variables = {
        "DEVICE": "cpu", "MODEL": str(folder / "model"), "DATA": str(folder / "data"), "OUTPUT": "out here",
        "PYTHON": sys.executable,
    }  # fmt: skip
    command = ["bash", str(ROOT / "scripts/finetune_lora.sh"), *make_flags(**SMALLER_TUNING)]
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    check_trained(tmp_path / "out here", "finetune_lora.sh")
    wrong = subprocess.run(
        [*command, "--max_step", "3"], cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert wrong.returncode == 2 and "did you mean --max_steps" in wrong.stderr
    assert wrong.stderr.endswith("launch: the trainers ended with code 2\n")
