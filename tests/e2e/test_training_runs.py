"""Whole runs in processes of their own: published commands, resume, signals, and everything that can go wrong."""

from __future__ import annotations

import json
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import LLM, ROOT, flags, make_tiny_model, rows, run_program
from oarlock.environment import matmul_library
from oarlock.train.checkpoint.manifest import read_manifest, verify
from oarlock.train.output.lock import LOCK_FILE

sys.path.insert(0, str(ROOT / "tests"))
import kill_and_resume
from unit.config.test_config import COMMAND_1, COMMAND_2


@pytest.fixture(scope="module")
def long_model(tmp_path_factory) -> Path:
    """Positions enough for the published lengths."""
    return make_tiny_model(tmp_path_factory.mktemp("long"), max_position_embeddings=2048)


def pretrain_flags(model: Path, corpus: Path, output: Path, **changes) -> list[str]:
    options = {
        "model_name_or_path": model, "input_dir": corpus, "output_dir": output, "max_seq_length": 32, "split": "90,10,0",
        "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1, "save_steps": 3, "learning_rate": 1e-3,
        "do_train": 1, "report_to": "none",
    }  # fmt: skip
    return flags(**(options | changes))


def wait_for_rows(path: Path, count: int, process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.005)
    raise AssertionError(
        f"{path} did not reach {count} rows: {process.communicate()[1] if process.poll() is not None else 'time'}"
    )


# the published commands, word for word but for the model, the data's place and the device


def published(text: str, model: Path) -> list[str]:
    words = shlex.split(text.replace("facebook/llama-7b", str(model)))
    return words[: words.index("--device")] if "--device" in words else words


@pytest.mark.parametrize("where", ["llm", "root"])
def test_published_pretraining_command(tmp_path, long_model, corpus, where):
    """Started as published but for a row every second step; stopped by SIGTERM after one (it asks for 10,000 steps)."""
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
    first = rows(tmp_path / "out" / "metrics.jsonl")[0]
    assert first["step"] == 2 and first["learning_rate"] == pytest.approx(1e-5 * 1 / 100)
    assert list((tmp_path / "out").glob("checkpoint-*/manifest.json"))
    assert list((tmp_path / "out" / "visualdl").iterdir())


def test_published_finetuning_command(tmp_path, long_model):
    """On the embedded instructions, as it names no data."""
    words = published(COMMAND_2, long_model)
    words[words.index("./checkpoints/")] = str(tmp_path / "out")
    result = run_program("finetune_generation.py", *words, "--device", "cpu", timeout=600)
    assert result.returncode == 0, result.stderr
    assert "no --dataset_name_or_path: fine-tuning on the embedded instructions" in result.stdout
    assert "--tensor_parallel_degree 4 not in effect" in result.stdout
    found = rows(tmp_path / "out" / "metrics.jsonl")
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
    trained = rows(tmp_path / "a" / "metrics.jsonl")
    result = run_program(
        "run_pretrain.py", *pretrain_flags(tmp_path / "a", corpus, tmp_path / "b", continue_training=1, max_steps=2)
    )
    assert result.returncode == 0, result.stderr
    again = rows(tmp_path / "b" / "metrics.jsonl")
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
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl") if "eval_perplexity" in row] == [0, 3, 6]
    assert {row["step"] for row in rows(tmp_path / "samples.jsonl")} == {0, 3, 6}


def test_embedded_text_without_input_dir(tmp_path, tiny_config):
    words = pretrain_flags(tiny_config, Path("x"), tmp_path / "out", max_steps=2)
    position = words.index("--input_dir")
    del words[position : position + 2]
    result = run_program("run_pretrain.py", *words, env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert result.returncode == 0, result.stderr
    assert "pretraining on the embedded text" in result.stdout
    assert list((tmp_path / "cache" / "oarlock").glob("stdlib-*.idx"))


# resume


def test_killed_at_random_moments_and_resumed_bit_for_bit(monkeypatch, capsys):
    """The short form of tests/kill_and_resume.py (20 kills are run by hand)."""
    monkeypatch.setattr(sys, "argv", ["kill_and_resume.py", "--kills", "3", "--steps", "200", "--seed", "5"])
    code = kill_and_resume.main()
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["same_losses"] and summary["same_weights"] and not summary["leftovers"], summary
    assert summary["kills"] == 3 and code == 0


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, tiny_config, corpus):
    words = pretrain_flags(tiny_config, corpus, tmp_path / "cut", max_steps=200, save_steps=1000)
    process = subprocess.Popen(
        [sys.executable, str(LLM / "run_pretrain.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_rows(tmp_path / "cut" / "metrics.jsonl", 1, process)
    process.send_signal(signal.SIGSTOP)  # it can't end before the second one was told
    second = run_program("run_pretrain.py", *words, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert second.returncode == 1 and not second.stdout
    assert f"process {process.pid} on" in second.stderr and "is running in this folder; nothing was" in second.stderr
    imported = {line.rpartition("|")[2].strip() for line in second.stderr.splitlines()}
    assert "oarlock.train.output.lock" in imported and not imported & {"paddle", "paddlenlp", "transformers"}
    process.send_signal(signal.SIGCONT)
    process.terminate()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "SIGTERM: finishing this step" in output and "the same command goes on from there" in output
    assert not (tmp_path / "cut" / "model.safetensors").exists() and not (tmp_path / "cut" / LOCK_FILE).exists()
    assert run_program("run_pretrain.py", *words).returncode == 0
    alone = pretrain_flags(tiny_config, corpus, tmp_path / "alone", max_steps=200, save_steps=1000)
    assert run_program("run_pretrain.py", *alone).returncode == 0
    first, second = (rows(tmp_path / name / "metrics.jsonl") for name in ("cut", "alone"))
    assert [(r["step"], r["loss"]) for r in first] == [(r["step"], r["loss"]) for r in second]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("cut", "alone")]
    assert all(np.array_equal(weights[0][key], weights[1][key]) for key in weights[1])


def test_a_changed_batch_size_goes_on_at_the_right_sample(tmp_path, tiny_config, corpus):
    run_program("run_pretrain.py", *pretrain_flags(tiny_config, corpus, tmp_path, num_train_epochs=1, max_steps=4))
    words = pretrain_flags(
        tiny_config, corpus, tmp_path, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        resume_from_checkpoint=tmp_path / "checkpoint-4",
    )  # fmt: skip
    result = run_program("run_pretrain.py", *words)
    assert result.returncode == 0, result.stderr
    assert "step 4, 16 samples seen" in result.stdout
    assert [row["samples"] for row in rows(tmp_path / "metrics.jsonl")][-2:] == [22, 28]


def test_a_damaged_checkpoint_is_passed_over(tmp_path, tiny_config, corpus):
    words = pretrain_flags(tiny_config, corpus, tmp_path)
    assert run_program("run_pretrain.py", *words).returncode == 0
    weights = tmp_path / "checkpoint-6" / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 255
    weights.write_bytes(content)
    expected = (tmp_path / "model.safetensors").read_bytes()
    result = run_program("run_pretrain.py", *words)
    assert result.returncode == 0, result.stderr
    assert (
        "checkpoint-6 is not used" in result.stdout
        and "going on from" in result.stdout
        and "checkpoint-3" in result.stdout
    )
    assert (tmp_path / "model.safetensors").read_bytes() == expected


@pytest.mark.skipif(not matmul_library.LIBRARY.exists(), reason=f"{matmul_library.LIBRARY.name} is not built")
def test_a_resumed_run_keeps_the_library_of_its_matrix_products(tmp_path, tiny_config, corpus):
    """As when it began on a machine with another processor."""
    other = next(library for library in matmul_library.TITLES if library != matmul_library.best())
    words = pretrain_flags(tiny_config, corpus, tmp_path / "out")
    first = run_program("run_pretrain.py", *words, env={matmul_library.VARIABLE: other})
    assert f"matrix products by {matmul_library.TITLES[other]}" in first.stdout, first.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["products"] == other
    whole = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    assert read_manifest(tmp_path / "out" / "checkpoint-3").products == other
    second = run_program("run_pretrain.py", *words, env={matmul_library.VARIABLE: ""})
    assert f"matrix products go on by {matmul_library.TITLES[other]}, as in the checkpoint" in second.stdout, (
        second.stderr
    )
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def test_another_configuration_is_refused(tmp_path, tiny_config, corpus):
    assert run_program("run_pretrain.py", *pretrain_flags(tiny_config, corpus, tmp_path)).returncode == 0
    result = run_program("run_pretrain.py", *pretrain_flags(tiny_config, corpus, tmp_path, learning_rate=2e-3))
    assert result.returncode == 1 and "learning_rate was 0.001, is 0.002" in result.stderr
    assert "Traceback" not in result.stderr


# what can go wrong


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path, tiny_config, tiny_tokenizer, corpus):
    other = shutil.copytree(tiny_tokenizer, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (other / "tokenizer.json").write_text(json.dumps(content))
    words = pretrain_flags(tiny_config, corpus, tmp_path / "out", tokenizer_name_or_path=str(other))
    result = run_program("run_pretrain.py", *words)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"was made with the tokenizer {tiny_tokenizer}" in result.stderr and str(other) in result.stderr


@pytest.mark.parametrize(
    ("changes", "code", "expected"),
    [
        ({"vocab_size": 300}, 2, "tokenizer and model do not belong together"),
        ({"max_seq_length": 512}, 2, "the model was made for 256"),
        ({"device": "gpu"}, 1, "this is a CPU build of Paddle"),
        ({"model_name_or_path": "/nowhere/model"}, 1, "no such folder"),
        ({"model_name_or_path": "no-such/model"}, 1, "not a folder here"),
        ({"input_dir": "/nowhere/data"}, 1, "neither a folder nor the prefix"),
        ({"model_type": "qwen2"}, 1, "is of type llama"),
        ({"num_attention_heads": 5}, 2, "not divisible by num_attention_heads 5"),
        ({"max_seq_length": 256, "split": "1,10000,0"}, 1, "one sample needs 257"),
        ({"output_dir": "/proc/none"}, 1, "can't be written"),
    ],
)
def test_problems_are_told_in_a_sentence(tmp_path, tiny_config, corpus, changes, code, expected):
    words = pretrain_flags(tiny_config, corpus, tmp_path / "out", **changes)
    result = run_program("run_pretrain.py", *words)
    assert result.returncode == code, result.stderr
    assert expected in result.stderr and "Traceback" not in result.stderr


def test_a_nan_loss_stops_and_names_the_newest_checkpoint(tmp_path, tiny_config, corpus):
    assert run_program("run_pretrain.py", *pretrain_flags(tiny_config, corpus, tmp_path)).returncode == 0
    folder = tmp_path / "checkpoint-6"
    tensors = load_file(folder / "rank-00000.safetensors")
    tensors["model/llama.norm.weight"][0] = np.nan
    save_file(tensors, folder / "rank-00000.safetensors", metadata={"format": "np"})
    manifest = read_manifest(folder)
    manifest.files = {}
    (folder / "manifest.json").unlink()
    manifest.seal(folder)
    words = pretrain_flags(tiny_config, corpus, tmp_path, max_steps=9, resume_from_checkpoint=folder)
    result = run_program("run_pretrain.py", *words)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"of step 7 is nan. Earlier checkpoints are intact (newest: {folder})" in result.stderr
    assert verify(folder).step == 6 and not (tmp_path / "checkpoint-9").exists()


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, tiny_config, corpus):
    """The kernel's limit on a file's size stands in for the full disk: writing fails in the middle of the save."""
    words = pretrain_flags(tiny_config, corpus, tmp_path)
    assert run_program("run_pretrain.py", *words).returncode == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-6").iterdir()}
    words = pretrain_flags(
        tiny_config, corpus, tmp_path, max_steps=12, resume_from_checkpoint=tmp_path / "checkpoint-6"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    result = run_program("run_pretrain.py", *words, preexec_fn=limit)
    assert result.returncode == 1, result.stdout
    assert "checkpoint-9 could not be written" in result.stderr and "checkpoint-6 is whole" in result.stderr
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-6").iterdir()} == before
    assert not (tmp_path / "checkpoint-9").exists() and not list(tmp_path.glob(".checkpoint-*"))


def test_pickled_weights_need_the_flag(tmp_path, tiny_model, corpus):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    code = (
        "import sys, paddle; from safetensors.numpy import load_file\n"
        "state = {k: paddle.to_tensor(v) for k, v in load_file(sys.argv[1]).items()}\n"
        "paddle.save(state, sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tiny_model / "model.safetensors"), str(folder / "model_state.pdparams")],
        check=True,
    )
    words = pretrain_flags(folder, corpus, tmp_path / "out", continue_training=1, max_steps=1)
    result = run_program("run_pretrain.py", *words)
    assert result.returncode == 1 and "--allow_pickle_weights" in result.stderr
    result = run_program("run_pretrain.py", *words, "--allow_pickle_weights")
    assert result.returncode == 0, result.stderr
    assert "reading pickled weights, as you allowed" in result.stdout


def test_one_loader_worker(tmp_path, tiny_config, corpus):
    words = pretrain_flags(tiny_config, corpus, tmp_path / "a", max_steps=3)
    assert run_program("run_pretrain.py", *words).returncode == 0
    result = run_program(
        "run_pretrain.py", *pretrain_flags(tiny_config, corpus, tmp_path / "b", max_steps=3, dataloader_num_workers=1)
    )
    assert result.returncode == 0, result.stderr
    assert [r["loss"] for r in rows(tmp_path / "a" / "metrics.jsonl")] == [
        r["loss"] for r in rows(tmp_path / "b" / "metrics.jsonl")
    ]


# fine-tuning


def test_finetuning_evaluates_by_generation_and_answers(tmp_path, tiny_model):
    records = [{"instruction": "Say it.", "input": word, "output": word} for word in ("water", "fire", "sun", "moon")]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(records * 8))
    (folder / "dev.jsonl").write_text("\n".join(map(json.dumps, records)))
    words = flags(
        model_name_or_path=tiny_model, dataset_name_or_path=folder, output_dir=tmp_path / "out", num_train_epochs=12,
        per_device_train_batch_size=8, learning_rate=1e-2, src_length=32, tgt_length=16, do_train=1, do_eval=1,
        do_generation=1, eval_on_start=1, eval_steps=24, save_strategy="no",
    )  # fmt: skip
    result = run_program("finetune_generation.py", *words)
    assert result.returncode == 0, result.stderr
    exact = [row["eval_exact_match"] for row in rows(tmp_path / "out" / "metrics.jsonl") if "eval_exact_match" in row]
    assert exact[0] == 0 and exact[-1] == 1.0
    assert (
        rows(tmp_path / "out" / "samples.jsonl")[-1]["answer"]
        == rows(tmp_path / "out" / "samples.jsonl")[-1]["expected"]
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
    assert rows(tmp_path / "eval" / "metrics.jsonl")[0]["eval_loss"] < 0.5


def test_data_errors_of_finetuning(tmp_path, tiny_model):
    (tmp_path / "train.jsonl").write_text('{"src": "a", "tgt": "b"}\n{"src": "a"}\n')
    words = flags(
        model_name_or_path=tiny_model,
        dataset_name_or_path=tmp_path / "train.jsonl",
        output_dir=tmp_path / "out",
        do_train=1,
    )
    result = run_program("finetune_generation.py", *words, "--src_length", "32", "--tgt_length", "32")
    assert result.returncode == 1 and "train.jsonl:2: field 'tgt' is missing" in result.stderr
    result = run_program("finetune_generation.py", *words, "--src_length", "200", "--tgt_length", "57")
    assert result.returncode == 2 and "--src_length + --tgt_length" in result.stderr
    result = run_program(
        "finetune_generation.py", *words, "--src_length", "32", "--tgt_length", "32", "--do_eval", "--skip_bad"
    )
    assert result.returncode == 1 and "has no dev file" in result.stderr


def test_wrong_flags_answer_at_once():
    """Before the seconds that importing Paddle takes."""
    result = run_program("finetune_generation.py", "--do_trian", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert result.returncode == 2 and "did you mean --do_train" in result.stderr
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")
    }
    assert "oarlock.errors" in imported and not imported & {"paddle", "paddlenlp", "transformers"}
