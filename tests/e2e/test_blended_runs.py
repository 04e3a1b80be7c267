"""Blends of corpora and of fine-tuning sets: trained, evaluated by name, resumed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from helpers import make_flags, make_tiny_model, read_rows
from oarlock.data.corpus.build_corpus import BuildOptions, build_corpus

COMMON = {"report_to": "none", "device": "cpu", "num_threads": 1, "disable_tqdm": 1, "collective_timeout": 60}
TUNING = COMMON | {
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "src_length": 16, "tgt_length": 16, "max_steps": 4,
    "logging_steps": 1, "eval_steps": 2, "save_steps": 2, "do_train": 1, "do_eval": 1, "learning_rate": 1e-3,
}  # fmt: skip


def run_all(folder: Path, commands: dict[str, list[str]]) -> dict[str, Any]:
    spec = []
    for name, words in commands.items():
        (folder / name).mkdir(exist_ok=True)
        spec.append({"name": name, "words": words, "folder": str(folder / name)})
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, str(Path(__file__).with_name("warm_runs.py")), "spec.json", "out.json"]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads((folder / "out.json").read_text())
    for name, result in found.items():
        assert not any(result["codes"]), f"{name}: {result['said']}"
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    make_tiny_model(folder / "model")
    for name, text in (("a", "water and fire "), ("b", "1 + 2 = 3; ")):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text * (i % 7 + 4)}) + "\n" for i in range(90))
        )
        build_corpus(
            BuildOptions((str(folder / f"{name}.jsonl"),), str(folder / "model"), str(folder / "corpora" / name))
        )
        (folder / f"{name}_sft.csv").write_text(
            "q,r\n" + "".join(f"{text}{i},{i}{f' {name}' * (i % 8 * 2 + 1)}\n" for i in range(24))
        )
    return folder


def pretrain(folder: Path, name: str, inputs: str, ranks: int = 1, **more: int) -> list[str]:
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [*launcher, "run_pretrain.py", *make_flags(**COMMON | {
        "model_name_or_path": folder / "model", "continue_training": 1, "input_dir": inputs, "split": "80,20,0",
        "max_seq_length": 16, "per_device_eval_batch_size": 3, "do_eval": 1, "output_dir": folder / name / "out", **more,
    })]  # fmt: skip


@pytest.fixture(scope="module")
def results(folder) -> dict[str, Any]:
    a, b = (str(folder / "corpora" / name) for name in "ab")
    sets = f"3 {folder}/a_sft.csv 1 {folder}/b_sft.csv"
    tune = {"model_name_or_path": folder / "model", "dataset_name_or_path": sets, "columns": "prompt=q,response=r",
            "validation_split": 0.25}  # fmt: skip
    commands = {
        "both": pretrain(folder, "both", f"0.7 {a} 0.3 {b}"),
        "both_on_two": pretrain(folder, "both_on_two", f"0.7 {a} 0.3 {b}", ranks=2),
        "pipeline": pretrain(folder, "pipeline", f"0.7 {a} 0.3 {b}", ranks=2, pipeline_parallel_degree=2),
        "a": pretrain(folder, "a", a),
        "b": pretrain(folder, "b", b),
        "tune": ["finetune_generation.py", *make_flags(**TUNING | tune | {"output_dir": folder / "tune" / "out"})],
        "packed": ["finetune_generation.py", *make_flags(**TUNING | tune | {
            "output_dir": folder / "packed" / "out", "packing": 1, "packing_length": 96, "do_generation": 1})],
    }  # fmt: skip
    found = run_all(folder, commands)
    whole = folder / "tune" / "out"
    shutil.copytree(whole, folder / "resumed" / "out")
    for path in (folder / "resumed" / "out").iterdir():
        if path.name not in ("checkpoint-2", "metrics.jsonl", "samples.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    words = ["finetune_generation.py", *make_flags(**TUNING | tune | {"output_dir": folder / "resumed" / "out"})]
    return found | run_all(folder, {"resumed": words})


def last(folder: Path, name: str) -> dict[str, Any]:
    return [row for row in read_rows(folder / name / "out" / "metrics.jsonl") if "eval_loss" in row][-1]


def test_a_blend_is_evaluated_by_corpus_and_weighted_as_trained(results, folder):
    both, a, b = (last(folder, name) for name in ("both", "a", "b"))
    assert both["eval_loss_a"] == pytest.approx(a["eval_loss"], rel=1e-6)
    assert both["eval_loss_b"] == pytest.approx(b["eval_loss"], rel=1e-6)
    assert abs(a["eval_loss"] - b["eval_loss"]) > 1e-3 and both["eval_tokens"] == a["eval_tokens"] + b["eval_tokens"]
    assert both["eval_loss"] == pytest.approx(0.7 * a["eval_loss"] + 0.3 * b["eval_loss"], rel=1e-6)
    for run in ("both_on_two", "pipeline"):
        found = last(folder, run)
        for name in ("eval_loss", "eval_loss_a", "eval_loss_b"):
            assert found[name] == pytest.approx(both[name], rel=1e-5), (run, name)
        assert found["eval_tokens"] == both["eval_tokens"]
    assert "eval_loss_a" not in a


def test_sets_are_fine_tuned_by_weight_and_resumed_exactly(results, folder):
    said = results["tune"]["said"]
    assert "blend: 75.0% a_sft.csv (18 samples" in said and "blend: 25.0% b_sft.csv (18 samples" in said
    assert "a_sft.csv: 6 of 24 examples are held out (--validation_split 0.25)" in said
    figures = last(folder, "tune")
    assert figures["eval_loss"] == pytest.approx(
        0.75 * figures["eval_loss_a_sft.csv"] + 0.25 * figures["eval_loss_b_sft.csv"], rel=1e-9
    )
    assert "resuming from" in results["resumed"]["said"] and "held out" in results["resumed"]["said"]
    whole, resumed = (
        [row for row in read_rows(folder / name / "out" / "metrics.jsonl") if row["step"] > 2]
        for name in ("tune", "resumed")
    )
    assert len(whole) == len(resumed) == 3
    for one, other in zip(whole, resumed, strict=True):
        for name in {"loss", "eval_loss", "eval_loss_a_sft.csv"} & set(one):
            assert one[name] == other[name]
    weights = [load_file(folder / name / "out" / "model.safetensors") for name in ("tune", "resumed")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_packs_of_several_sets(results, folder):
    said = results["packed"]["said"]
    assert said.count("packing: 18 examples in ") == 2 and "blend: 75.0% a_sft.csv" in said
    figures = last(folder, "packed")
    assert "eval_loss_b_sft.csv" in figures and "eval_exact_match" in figures
