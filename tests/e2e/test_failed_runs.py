"""Failures of pretraining runs."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import ROOT, make_flags, run_program
from oarlock.train.checkpoint.manifest import read_manifest, verify

sys.path.insert(0, str(ROOT / "tests"))

from support.training_runs import pretrain_flags

# possible failures


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
        ({"vocab_size": 300}, 2, "tokenizer and model do not match"),
        ({"max_seq_length": 512}, 2, "the model supports 256"),
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
def test_problems_are_reported_in_one_sentence(tmp_path, tiny_config, corpus, changes, code, expected):
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
    """A limit on the file size (RLIMIT_FSIZE) simulates the full disk: writing fails in the middle of a save."""
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
    assert "checkpoint-9 could not be written" in result.stderr and "checkpoint-6 is complete" in result.stderr
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


def test_data_errors_of_finetuning(tmp_path, tiny_model):
    (tmp_path / "train.jsonl").write_text('{"src": "a", "tgt": "b"}\n{"src": "a"}\n')
    words = make_flags(
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


def test_wrong_flags_fail_before_paddle_is_imported():
    """Importing Paddle takes seconds."""
    result = run_program("finetune_generation.py", "--do_trian", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert result.returncode == 2 and "did you mean --do_train" in result.stderr
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")
    }
    assert "oarlock.errors" in imported and not imported & {"paddle", "paddlenlp", "transformers"}
