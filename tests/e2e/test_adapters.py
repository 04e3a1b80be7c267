"""Adapters as users use them: published commands, evaluation, questions, resume, another base."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import LLM, make_flags, make_tiny_model, read_rows, run_program
from support.published_commands import COMMAND_2

# Commands 3, 4 and 6: "as 2 with no launcher and no tensor_parallel_degree, and ...".
ONE_CARD = COMMAND_2.replace("--tensor_parallel_degree 4", "")
COMMANDS = {
    "lora": f"{ONE_CARD} --num_train_epochs 2 --gradient_accumulation_steps 4 --learning_rate 3e-4 --lora True --r 8",
    "prefix": f"{ONE_CARD} --num_train_epochs 2 --gradient_accumulation_steps 4 --learning_rate 3e-2 "
    "--prefix_tuning True --num_prefix_tokens 64",
    "instruction": f"{COMMAND_2} --instruction_generation",
}
RECORDS = [{"instruction": "Say it.", "input": word, "output": word} for word in ("water", "fire", "sun", "moon")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base and data for all tests here."""
    folder = tmp_path_factory.mktemp("adapters")
    make_tiny_model(folder / "long", max_position_embeddings=2048)
    (folder / "data").mkdir()
    (folder / "data" / "train.json").write_text(json.dumps(RECORDS * 8))
    (folder / "data" / "dev.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return folder


def words(folder: Path, base: Path, **more) -> list[str]:
    options = {
        "model_name_or_path": base, "dataset_name_or_path": folder / "data", "per_device_train_batch_size": 8,
        "src_length": 32, "tgt_length": 16, "do_train": 1, "do_eval": 1, "report_to": "none", "logging_steps": 1,
    }  # fmt: skip
    return make_flags(**(options | more))


@pytest.mark.parametrize("name", COMMANDS)
def test_published_commands(tmp_path, folder, name):
    """The commands start as published; SIGTERM stops them after a log row."""
    command = shlex.split(COMMANDS[name].replace("facebook/llama-7b", str(folder / "long")))
    command[command.index("./checkpoints/")] = str(tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, "finetune_generation.py", *command, "--device", "cpu", "--logging_steps", "1"],
        cwd=LLM, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert read_rows(metrics)[0]["step"] == 1
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    trained = {key.split("/", 1)[1] for key in load_file(checkpoint / "rank-00000.safetensors")}
    if name == "instruction":
        assert "chat template: alpaca" in output and "llama.norm.weight" in trained
    elif name == "lora":
        assert len(trained) == 2 * 7 * 2 and all("lora_" in key for key in trained)  # A and B, 7 layers in 2 blocks
        assert json.loads((checkpoint / "adapter.json").read_text())["settings"]["r"] == 8
    else:
        assert trained == {"prefix_encoder.weight"}
        shape = load_file(checkpoint / "rank-00000.safetensors")["model/prefix_encoder.weight"].shape
        assert shape == (64, 4, 2, 8)  # keys and values of two layers, two key/value heads of size 8


METHODS = {
    "lora": {"lora": 1, "learning_rate": 3e-2},
    "qlora": {"qlora": 1, "learning_rate": 3e-2},
    "p_tuning": {"p_tuning": 1, "num_virtual_tokens": 8, "learning_rate": 1e-2, "p_tuning_hidden_size": 48},
}


@pytest.mark.parametrize("name", METHODS)
def test_from_training_to_answers(tmp_path, folder, tiny_model, name):
    out = tmp_path / "out"
    command = words(
        folder, tiny_model, num_train_epochs=12, save_steps=24, eval_steps=48, do_generation=1, output_dir=out,
        overwrite_output_dir=1, **METHODS[name],
    )  # fmt: skip
    result = run_program("finetune_generation.py", *command)
    assert result.returncode == 0, result.stderr
    losses = [row["loss"] for row in read_rows(out / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    saved = {path.name for path in out.iterdir()}
    assert {"adapter.json", "peft_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= saved
    assert not any(path.startswith("model") for path in saved)  # the base is not saved again

    # Evaluating the adapter alone gives the loss at the end of training.
    evaluated = run_program(
        "finetune_generation.py",
        *words(folder, tiny_model, do_train=0, output_dir=tmp_path / "eval", adapter_name_or_path=out, **METHODS[name]),
    )
    assert evaluated.returncode == 0, evaluated.stderr
    last = [row["eval_loss"] for row in read_rows(out / "metrics.jsonl") if "eval_loss" in row][-1]
    assert read_rows(tmp_path / "eval" / "metrics.jsonl")[-1]["eval_loss"] == pytest.approx(last, rel=1e-6)

    asked = run_program("oarlock", "ask", str(out), "Say it.\nfire", "--max-new-tokens", "16")
    samples = {row["prompt"]: row["answer"] for row in read_rows(out / "samples.jsonl")[-4:]}
    answer = next(text for prompt, text in samples.items() if "fire" in prompt)
    assert asked.stdout.splitlines()[-1].strip() == f"A: {answer.strip()}".strip(), asked.stderr

    # A checkpoint becomes the same adapter.
    done = run_program("oarlock", "checkpoint", "consolidate", str(out / "checkpoint-48"), str(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    final, whole = load_file(out / "peft_model.safetensors"), load_file(tmp_path / "whole" / "peft_model.safetensors")
    assert final.keys() == whole.keys()
    for key, values in final.items():
        np.testing.assert_array_equal(values, whole[key])


def test_another_base_is_refused(tmp_path, folder, tiny_model):
    """Both on resume and when a question is asked."""
    out, other = tmp_path / "out", make_tiny_model(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["llama.norm.weight"][-1] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "np"})
    command = words(folder, tiny_model, lora=1, max_steps=2, do_eval=0, output_dir=out)
    assert run_program("finetune_generation.py", *command).returncode == 0
    again = run_program("finetune_generation.py", *command, "--model_name_or_path", str(other), "--max_steps", "3")
    assert again.returncode == 1 and "the weights of the base model" in again.stderr
    asked = run_program("oarlock", "ask", str(out), "Say it.", "--base", str(other))
    assert asked.returncode == 1 and "is not the base of this adapter" in asked.stderr
