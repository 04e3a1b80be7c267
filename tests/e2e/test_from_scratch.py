"""From text to answers: a tokenizer, a corpus and a model of one's own, pretrained and asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from helpers import ROOT, make_flags, read_rows, run_program
from oarlock import Engine, Prompt, SamplingParams
from oarlock.cli.main import main


def run(*words: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert not ended.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tokenizer, the corpus and the new model."""
    folder = tmp_path_factory.mktemp("scratch")
    run("data", "tokenizer", "--input", ROOT / "docs", "--vocab-size", 1000, "--output", folder / "tokenizer")
    run("data", "pretrain", "--input", ROOT / "docs", "--tokenizer", folder / "tokenizer",
        "--output-prefix", folder / "corpus" / "docs", "--workers", 1)  # fmt: skip
    run("model", "new", "--family", "qwen3", "--parameters", "300K", "--tokenizer", folder / "tokenizer",
        "--max-length", 128, "--output", folder / "model")  # fmt: skip
    return folder


def pretrain(folder: Path, name: str, **options: object) -> list[dict]:
    flags = {
        "model_name_or_path": folder / "model", "input_dir": folder / "corpus" / "docs", "output_dir": folder / name,
        "split": "90,10,0", "max_seq_length": 64, "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1,
        "do_train": True, "device": "cpu", "learning_rate": 1e-2, "warmup_steps": 1,
    }  # fmt: skip
    done = run_program("oarlock", "pretrain", *make_flags(**flags | options))
    assert done.returncode == 0, done.stderr
    return read_rows(folder / name / "metrics.jsonl")


@pytest.fixture(scope="module")
def loaded(folder) -> list[dict]:
    """The rows of a run that begins with the weights of the new model."""
    return pretrain(folder, "loaded", continue_training=True)


def test_the_new_model_trains_and_answers(folder, loaded):
    rows = [row["loss"] for row in loaded if "loss" in row]
    assert len(rows) == 6 and 6 < rows[0] < 8 and rows[-1] < rows[0] - 0.05, rows  # log 1024 = 6.93
    engine = Engine.load(str(folder / "loaded"))
    params = SamplingParams(max_tokens=5, temperature=0)
    chunks = list(engine.stream(Prompt(messages=[{"role": "user", "content": "What is a corpus?"}]), params))
    engine.close()
    assert chunks


def test_its_weights_are_those_that_pretraining_draws(folder, loaded):
    assert pretrain(folder, "drawn")[0]["loss"] == loaded[0]["loss"]


def test_weights_follow_the_seed_the_type_and_the_file_size(folder):
    new = ["model", "new", "--family", "qwen3", "--parameters", "300K", "--tokenizer", folder / "tokenizer",
           "--max-length", 128]  # fmt: skip
    run(*new, "--output", folder / "same")
    assert (folder / "same" / "model.safetensors").read_bytes() == (folder / "model" / "model.safetensors").read_bytes()
    run(*new, "--output", folder / "other", "--seed", 1, "--dtype", "bfloat16", "--max-shard-size", 0.0002)
    files = sorted((folder / "other").glob("model-*.safetensors"))
    assert len(files) > 2 and all(path.stat().st_size < 300_000 for path in files)
    with safe_open(files[0], "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    run(*new, "--output", folder / "light", "--no-weights")
    assert not list((folder / "light").glob("*.safetensors")) and (folder / "light" / "tokenizer.json").is_file()


def test_nothing_is_written_on_a_dry_run(folder, capsys):
    run("model", "new", "--family", "mixtral", "--parameters", "3M", "--tokenizer", folder / "tokenizer",
        "--output", folder / "never", "--dry-run")  # fmt: skip
    shown = capsys.readouterr().out
    assert "experts" in shown and "of width" in shown and "1,024" in shown and "nothing was written" in shown
    assert not (folder / "never").exists()
