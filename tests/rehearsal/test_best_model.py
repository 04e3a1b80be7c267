"""Early stopping, the best model at the end, and answers to fixed prompts, under plans and across a resume.

This file is also the program that the tests start once: it imports Paddle and forks the ranks of one run after the
other. All runs learn a few made-up records by heart, so that the loss on the others falls and then rises.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers import make_flags, read_rows
from oarlock.train.checkpoint.manifest import list_checkpoints, read_manifest
from oarlock.weights.shard_index import WEIGHTS
from oarlock.weights.sharded_store import ShardedStore

LLM = Path(__file__).resolve().parents[2] / "llm"
PATIENCE = 2
DURING_EVALUATION = -1
# name -> (ranks, flags, step at which SIGTERM comes, name of the output folder)
RUNS = {
    "one": (1, {"do_generation": 1, "eval_prompts": "prompts.jsonl", "report_to": "visualdl"}, 0, "one"),
    "again": (1, {"do_generation": 1, "eval_prompts": "prompts.jsonl", "report_to": "visualdl"}, 0, "one"),
    "stage2": (2, {"per_device_train_batch_size": 4, "sharding": "stage2", "async_save": 1}, 0, "stage2"),
    "stage3": (2, {"per_device_train_batch_size": 4, "sharding": "stage3", "stage3_min_elements": 512}, 0, "stage3"),
    "split": (4, {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2, "per_device_train_batch_size": 4,
                  "gradient_accumulation_steps": 2}, 0, "split"),
    "cut": (1, {}, 4, "cut"),
    "interrupted": (1, {}, DURING_EVALUATION, "cut"),
    "resumed": (1, {}, 0, "cut"),
}  # fmt: skip
PLANS = ("one", "stage2", "stage3", "split", "cut")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model) -> Path:
    """A folder with the outputs and logs of all runs."""
    folder = tmp_path_factory.mktemp("best")
    draw = random.Random(3)
    words = ["water", "fire", "sun", "moon", "山", "水", "日", "月", "red", "blue", "one", "two", "three", "four"]
    records = [
        {"src": " ".join(draw.choices(words, k=4)), "tgt": " ".join(draw.choices(words, k=3))} for _ in range(28)
    ]
    (folder / "data").mkdir()
    for name, part in (("train", records[:16]), ("dev", records[16:])):
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in part))
    prompts = [{"messages": [{"role": "user", "content": "water fire"}]}, {"src": "日 月", "tgt": "月"}]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(prompt) for prompt in prompts))
    program = subprocess.run(
        [sys.executable, __file__, str(folder), str(tiny_model)],
        env={**os.environ, "PYTHONPATH": f"{LLM}:{LLM.parent / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert program.returncode == 0, program.stdout[-3000:] + program.stderr[-3000:]
    return folder


def log(runs: Path, name: str) -> str:
    return (runs / "log" / name / "workerlog.0").read_text()


def evaluations(runs: Path, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row["eval_loss"]) for row in read_rows(runs / name / "metrics.jsonl") if "eval_loss" in row]


def best_of(runs: Path, name: str) -> tuple[int, float]:
    return min(evaluations(runs, name), key=lambda pair: pair[1])


@pytest.mark.parametrize("name", PLANS)
def test_training_stops_without_improvement(runs, name):
    found, (best, value) = evaluations(runs, name), best_of(runs, name)
    assert 2 < best < found[-1][0] < 40 and found[-1][0] == best + 2 * PATIENCE
    newest, *others = list_checkpoints(runs / name)
    assert newest.name == f"checkpoint-{found[-1][0]}" and [path.name for path in others] == [f"checkpoint-{best}"]
    assert read_manifest(newest).best == {
        "metric": "eval_loss", "value": value, "step": best, "name": f"checkpoint-{best}", "evaluations_since": PATIENCE,
    }  # fmt: skip
    np.testing.assert_allclose([v for _, v in found], [v for _, v in evaluations(runs, "one")], rtol=2e-3)


@pytest.mark.parametrize("name", PLANS)
def test_the_final_model_is_the_best_one(runs, name):
    best, _ = best_of(runs, name)
    final = load_file(runs / name / "model.safetensors")
    newest = list_checkpoints(runs / name)[0]
    with ShardedStore.open(runs / name / f"checkpoint-{best}") as pieces, ShardedStore.open(newest) as last:
        assert set(pieces.names(WEIGHTS)) == set(final)
        for key, values in final.items():
            assert np.array_equal(pieces.read(key), values), key
        assert any(not np.array_equal(last.read(key), values) for key, values in final.items())
    said = log(runs, "resumed" if name == "cut" else name)
    assert f"at step {best}: checkpoint-{best} is the final model" in said
    assert f"done: {best + 2 * PATIENCE} steps" in said and "stopping early" in said


def test_a_resumed_run_decides_as_an_uninterrupted_one(runs):
    """SIGTERM arrives at an evaluation step: the resumed run begins with it, even if SIGTERM interrupts it again."""
    for name in ("cut", "interrupted"):
        assert "stopped by SIGTERM at step 4" in log(runs, name)
    assert "oarlock: step" not in log(runs, "interrupted")
    assert evaluations(runs, "cut") == evaluations(runs, "one")
    epochs = [[row["epoch"] for row in read_rows(runs / name / "metrics.jsonl")] for name in ("one", "cut")]
    assert epochs[0] == epochs[1]
    one, cut = (load_file(runs / name / "model.safetensors") for name in ("one", "cut"))
    assert all(np.array_equal(one[key], cut[key]) for key in one)


def test_a_run_that_stopped_early_is_complete(runs):
    said = log(runs, "again")
    assert "this run is complete" in said and "is the final model" in said and "oarlock: step" not in said


def test_metrics_of_the_answers(runs):
    row = [row for row in read_rows(runs / "one" / "metrics.jsonl") if "eval_bleu" in row][-1]
    assert {"eval_exact_match", "eval_rouge_1", "eval_rouge_2", "eval_rouge_l"} <= set(row)
    assert 0 < row["eval_rouge_1"] < 1 and 0 <= row["eval_bleu"] < 100
    assert "tok:zh" in log(runs, "one")


def test_fixed_prompts_are_answered_at_every_evaluation(runs):
    from visualdl import LogReader

    found = [row for row in read_rows(runs / "one" / "samples.jsonl") if "source" in row]
    steps = [step for step, _ in evaluations(runs, "one")]
    assert [(row["step"], row["source"]) for row in found] == [
        (step, f"prompts.jsonl:{line}") for step in steps for line in (1, 2)
    ]
    assert [row["epoch"] for row in found[::2]] == [step * 8 / 16 for step in steps]
    assert "water fire" in found[0]["prompt"] and "expected" not in found[0] and found[1]["expected"] == "月"
    assert len({row["answer"] for row in found[::2]}) > 1
    (file,) = sorted((runs / "one" / "visualdl").rglob("vdlrecords*.log"))[-1:]
    texts = LogReader(file_path=str(file)).get_data("text", "eval_prompts")
    assert [record.id for record in texts] == steps
    for step, record in zip(steps, texts, strict=True):
        answers = [row["answer"] for row in found if row["step"] == step]
        assert all(f"=> {answer}" in record.text.encoded_text_string for answer in answers)


# The program.


def main(folder: Path, model: Path) -> int:
    """In the parent: import, fork, wait."""
    from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level

    import_paddle(1)
    import oarlock.train.finetune  # noqa: F401
    from oarlock.cpu_ranks.fork_launch import launch

    set_paddlenlp_log_level("error")
    for name, (ranks, changes, stop_at, output) in RUNS.items():
        words = make_flags(**({
            "model_name_or_path": model, "dataset_name_or_path": folder / "data", "output_dir": folder / output,
            "src_length": 32, "tgt_length": 16, "do_train": 1, "do_eval": 1, "max_steps": 40, "learning_rate": 3e-2,
            "per_device_train_batch_size": 8, "eval_steps": 2, "save_steps": 1000, "save_total_limit": 1,
            "logging_steps": 1, "report_to": "none", "device": "cpu", "adam_epsilon": 1e-5, "num_threads": 1,
            "early_stopping_patience": PATIENCE, "load_best_model_at_end": 1, "collective_timeout": 60,
        } | changes))  # fmt: skip
        codes = launch(ranks, partial(run, words, stop_at, folder), folder / "log" / name, timeout_s=120, quiet=True)
        if any(codes):
            print(f"== {name} {codes}")
            for path in sorted((folder / "log" / name).iterdir()):
                print(f"== {path.name}\n{path.read_text()[-2500:]}")
            return 1
    return 0


def run(words: list[str], stop_at: int, folder: Path) -> int:
    """A complete fine-tuning run on one rank."""
    from paddlenlp.trainer import TrainerCallback

    from oarlock.config import FinetuneConfig, load_config
    from oarlock.train import finetune

    os.chdir(folder)
    if stop_at:
        make = finetune.make_trainer

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step == stop_at - 1:  # noticed in the step after it
                    os.kill(os.getpid(), 15)

            def on_prediction_step(self, args, state, control, **_):
                if stop_at == DURING_EVALUATION:
                    os.kill(os.getpid(), 15)

        def make_trainer(*args, **kwargs):
            trainer = make(*args, **kwargs)
            trainer.add_callback(Stop())
            return trainer

        finetune.make_trainer = make_trainer
    return finetune.finetune(load_config(FinetuneConfig, words))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
