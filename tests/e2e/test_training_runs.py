"""Training runs in separate processes: published commands, pretraining and fine-tuning."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import LLM, ROOT, make_flags, make_tiny_model, read_rows, run_program

sys.path.insert(0, str(ROOT / "tests"))
from support.published_commands import COMMAND_1, COMMAND_2
from support.training_runs import pretrain_flags, wait_for_rows


@pytest.fixture(scope="module")
def long_model(tmp_path_factory) -> Path:
    """A model with enough positions for the published lengths."""
    return make_tiny_model(tmp_path_factory.mktemp("long"), max_position_embeddings=2048)


# the published commands verbatim, except for the model, the data path and the device


def published(text: str, model: Path) -> list[str]:
    words = shlex.split(text.replace("facebook/llama-7b", str(model)))
    return words[: words.index("--device")] if "--device" in words else words


@pytest.mark.parametrize("where", ["llm", "root"])
def test_published_pretraining_command(tmp_path, long_model, corpus, where):
    """Runs as published except for a log row every second step; SIGTERM stops it after one row (it asks for 10,000
    steps).
    """
    words = published(COMMAND_1, long_model)
    words[words.index("./data")] = str(corpus)
    words[words.index("output/llama_hybid")] = str(tmp_path / "out")
    program = "run_pretrain.py" if where == "llm" else "llm/run_pretrain.py"
    process = subprocess.Popen(
        [sys.executable, "-u", program, *words, "--device", "cpu", "--split", "90,10,0", "--logging_steps", "2"],
        cwd=LLM if where == "llm" else ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_rows(tmp_path / "out" / "metrics.jsonl", 1, process)
    process.terminate()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    for sentence in (
        "fp16 on a CPU: training in float32",
        "no flash attention on a CPU",
        "--sharding stage2 not in effect",
    ):
        assert output.count(sentence) == 1
    first = read_rows(tmp_path / "out" / "metrics.jsonl")[0]
    assert first["step"] == 2 and first["learning_rate"] == pytest.approx(1e-5 * 1 / 100)
    assert list((tmp_path / "out").glob("checkpoint-*/manifest.json"))
    assert list((tmp_path / "out" / "visualdl").iterdir())


def test_published_finetuning_command(tmp_path, long_model):
    """Runs on the embedded instructions, since it names no data."""
    words = published(COMMAND_2, long_model)
    words[words.index("./checkpoints/")] = str(tmp_path / "out")
    result = run_program("finetune_generation.py", *words, "--device", "cpu", timeout=600)
    assert result.returncode == 0, result.stderr
    assert "no --dataset_name_or_path: fine-tuning on the embedded instructions" in result.stdout
    assert "--tensor_parallel_degree 4 not in effect" in result.stdout
    found = read_rows(tmp_path / "out" / "metrics.jsonl")
    losses = [row["loss"] for row in found if "loss" in row]
    assert found[-1]["eval_loss"] < 7 and losses[-1] < losses[0] and found[-2]["step"] == 53
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "oarlock_config.yaml",
        "run.json",
    } <= saved
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "finetune_generation.py" in record["command"] and record["versions"]["paddlenlp"]


# pretraining


def test_continue_training_starts_from_the_weights(tmp_path, tiny_model, corpus):
    result = run_program(
        "run_pretrain.py", *pretrain_flags(tiny_model, corpus, tmp_path / "a", max_steps=60, learning_rate=3e-3)
    )
    assert result.returncode == 0, result.stderr
    trained = read_rows(tmp_path / "a" / "metrics.jsonl")
    result = run_program(
        "run_pretrain.py", *pretrain_flags(tmp_path / "a", corpus, tmp_path / "b", continue_training=1, max_steps=2)
    )
    assert result.returncode == 0, result.stderr
    again = read_rows(tmp_path / "b" / "metrics.jsonl")
    assert trained[0]["loss"] > 5.5 and again[0]["loss"] < trained[-10]["loss"] + 0.3
    keys = {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "tokens_per_second_per_device",
        "tflops_per_device",
        "samples",
        "epoch",
    }
    assert keys <= set(trained[0])


def test_blended_corpora_with_evaluation(tmp_path, tiny_config, corpus):
    blend = f"0.25 {corpus / 'c'} 0.75 {corpus / 'c'}"
    result = run_program(
        "run_pretrain.py",
        *pretrain_flags(tiny_config, corpus, tmp_path, input_dir=blend, do_eval=1, eval_steps=3, eval_on_start=1),
    )
    assert result.returncode == 0, result.stderr
    assert "blend: 25.0%" in result.stdout
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl") if "eval_perplexity" in row] == [0, 3, 6]
    assert {row["step"] for row in read_rows(tmp_path / "samples.jsonl")} == {0, 3, 6}


def test_embedded_text_without_input_dir(tmp_path, tiny_config):
    words = pretrain_flags(tiny_config, Path("x"), tmp_path / "out", max_steps=2)
    position = words.index("--input_dir")
    del words[position : position + 2]
    result = run_program("run_pretrain.py", *words, env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert result.returncode == 0, result.stderr
    assert "pretraining on the embedded text" in result.stdout
    assert list((tmp_path / "cache" / "oarlock").glob("stdlib-*.idx"))


def test_one_loader_worker(tmp_path, tiny_config, corpus):
    words = pretrain_flags(tiny_config, corpus, tmp_path / "a", max_steps=3)
    assert run_program("run_pretrain.py", *words).returncode == 0
    result = run_program(
        "run_pretrain.py", *pretrain_flags(tiny_config, corpus, tmp_path / "b", max_steps=3, dataloader_num_workers=1)
    )
    assert result.returncode == 0, result.stderr
    assert [r["loss"] for r in read_rows(tmp_path / "a" / "metrics.jsonl")] == [
        r["loss"] for r in read_rows(tmp_path / "b" / "metrics.jsonl")
    ]


# fine-tuning


def test_finetuning_evaluates_by_generation_and_answers(tmp_path, tiny_model):
    records = [{"instruction": "Say it.", "input": word, "output": word} for word in ("water", "fire", "sun", "moon")]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(records * 8))
    (folder / "dev.jsonl").write_text("\n".join(map(json.dumps, records)))
    words = make_flags(
        model_name_or_path=tiny_model, dataset_name_or_path=folder, output_dir=tmp_path / "out", num_train_epochs=12,
        per_device_train_batch_size=8, learning_rate=1e-2, src_length=32, tgt_length=16, do_train=1, do_eval=1,
        do_generation=1, eval_on_start=1, eval_steps=24, save_strategy="no",
    )  # fmt: skip
    result = run_program("finetune_generation.py", *words)
    assert result.returncode == 0, result.stderr
    exact = [
        row["eval_exact_match"] for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "eval_exact_match" in row
    ]
    assert exact[0] == 0 and exact[-1] == 1.0
    assert (
        read_rows(tmp_path / "out" / "samples.jsonl")[-1]["answer"]
        == read_rows(tmp_path / "out" / "samples.jsonl")[-1]["expected"]
    )
    asked = run_program("oarlock", "ask", str(tmp_path / "out"), "Say it.\nfire")
    assert asked.stdout.splitlines()[-1] == "A: fire", asked.stderr
    again = run_program(
        "finetune_generation.py",
        *words[: words.index("--do_train")],
        "--do_eval",
        "--model_name_or_path",
        str(tmp_path / "out"),
        "--output_dir",
        str(tmp_path / "eval"),
    )
    assert again.returncode == 0, again.stderr
    assert read_rows(tmp_path / "eval" / "metrics.jsonl")[0]["eval_loss"] < 0.5
