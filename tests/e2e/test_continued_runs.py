"""After a run: the printed advice works as printed, and an adapter folder can be used in place of a model.

All training runs of a stage run in one process (warm_runs.py), from a folder in which the base is a relative path.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import make_flags, make_tiny_model, read_rows
from oarlock.config.shared import ScheduleSection
from oarlock.train.optim.schedule import make_scheduler

WARM = Path(__file__).with_name("warm_runs.py")
BASE = "models/tiny/base"  # two "/": never a name on a hub
TWO_RANKS = ["-m", "paddle.distributed.launch", "--devices", "0,1"]
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": 1, "r": 3, "lora_alpha": 5, "lora_target_modules": "q_proj,up_proj"},
    "qlora": {"qlora": 1, "r": 4, "weight_quantize_algo": "fp4", "qlora_weight_blocksize": 32},
    "prefix": {"prefix_tuning": 1, "num_prefix_tokens": 5},
    "p_tuning": {"p_tuning": 1, "num_virtual_tokens": 6, "p_tuning_encoder": "mlp", "p_tuning_hidden_size": 24},
}
ADAPTERS = [name for name in METHODS if name != "full"]
PLANS = {"tensor parallel": {"tensor_parallel_degree": 2}, "lora under sharding": {"sharding": "stage2", "lora": 1}}
COMPLETE = [*METHODS, *PLANS, "epochs", "pretrain"]


class Stage:
    """Training commands and what came of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, Any] = {}

    def run(self, commands: dict[str, list[str]], cwd: Path | None = None) -> None:
        spec = [
            {"name": name, "words": words, "folder": str(self.folder / "logs" / name)}
            for name, words in commands.items()
        ]
        asked, answered = self.folder / "spec.json", self.folder / "results.json"
        asked.write_text(json.dumps(spec))
        done = subprocess.run(
            [sys.executable, str(WARM), str(asked), str(answered)], cwd=cwd or self.folder, capture_output=True,
            text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        self.results |= json.loads(answered.read_text())

    def said(self, name: str, code: int = 0) -> str:
        result = self.results[name]
        assert result["codes"][0] == code, result["said"][-4000:]
        return result["said"]

    def words(self, name: str, **more: Any) -> list[str]:
        """The command of a run; the model has 256 positions and no length is given."""
        options = {
            "model_name_or_path": BASE, "output_dir": f"out/{name.replace(' ', '-')}", "do_train": 1, "do_eval": 1,
            "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none",
            "device": "cpu", "logging_steps": 1,
        }  # fmt: skip
        if name == "pretrain":
            return [
                "run_pretrain.py",
                *make_flags(**(options | {"input_dir": self.folder / "corpus", "do_eval": 0} | more)),
            ]
        options |= {"dataset_name_or_path": str(self.folder / "data")} | METHODS.get(name, {}) | PLANS.get(name, {})
        if name == "epochs":
            options |= {"max_steps": -1, "num_train_epochs": 1}
        start = TWO_RANKS if name in PLANS else []
        return [*start, "finetune_generation.py", *make_flags(**(options | more))]

    def read_rows(self, name: str, key: str) -> list[dict[str, Any]]:
        return [row for row in read_rows(self.folder / "out" / name.replace(" ", "-") / "metrics.jsonl") if key in row]


@pytest.fixture(scope="module")
def stage(tmp_path_factory, corpus) -> Stage:
    """Every run of COMPLETE once to its end, and once more: what it then says is the advice."""
    folder = tmp_path_factory.mktemp("going-on")
    make_tiny_model(folder / BASE)
    (folder / "data").mkdir()
    records = [
        {"src": f"count to {i}", "tgt": " ".join(["one", "two", "three", "four"][: 1 + i % 4])} for i in range(6)
    ]
    for side in ("train", "dev"):
        (folder / "data" / f"{side}.jsonl").write_text("\n".join(map(json.dumps, records)))
    os.symlink(corpus, folder / "corpus")
    stage = Stage(folder)
    patience = {"early_stopping_patience": 1, "early_stopping_threshold": 100, "eval_steps": 1, "max_steps": 9}
    first = {name: stage.words(name) for name in COMPLETE} | {"patience": stage.words("patience", **patience)}
    changed = {"learning_rate": 3e-3, "output_dir": "out/epochs", "num_train_epochs": 1, "max_steps": -1}
    stage.run(
        first
        | {f"{name} again": words for name, words in first.items()}
        | {"another": stage.words("full", **changed)}
        | {"too long": stage.words("full", output_dir="out/long", src_length=200, tgt_length=57)}
    )
    return stage


@pytest.fixture(scope="module")
def longer(stage) -> Stage:
    """The advice of every run, followed."""
    commands = {}
    for name in COMPLETE:
        said = stage.said(f"{name} again")
        found = re.search(r"complete; to train longer, increase (--\w+) \(now ([\d.]+)\) and add (--\w+) (\S+);", said)
        assert found, said
        length, now, resume, checkpoint = found.groups()
        start = stage.words(name)
        commands[f"{name} longer"] = [*start, length, str(2 * int(now)), resume, checkpoint]
    found = re.search(r"without improvement; to train longer, increase (--\w+) \(now 1\)", stage.said("patience again"))
    assert found
    patience = stage.words("patience", early_stopping_threshold=100, eval_steps=1, max_steps=9)
    commands["patience longer"] = [*patience, found[1], "3"]
    found = re.search(r"(--resume_from_checkpoint) (\S+)", stage.said("another", code=1))
    assert found
    changed = {"learning_rate": 3e-3, "output_dir": "out/another", "num_train_epochs": 2, "max_steps": -1}
    commands["another all the same"] = [*stage.words("full", **changed), found[1], found[2]]
    stage.run(commands)
    return stage


@pytest.mark.parametrize("name", COMPLETE)
def test_following_the_printed_advice_extends_a_complete_run(longer, name):
    said = longer.said(f"{name} longer")
    steps = 6 if name == "epochs" else 4
    assert f"resuming from out/{name.replace(' ', '-')}/checkpoint-{steps // 2} (step {steps // 2}, " in said
    assert f"{steps} steps of" in said and f"done: {steps} steps; " in said
    # From there on the learning rate is that of the longer run, and the log gives both values.
    scheduler = make_scheduler(ScheduleSection(learning_rate=1e-2), steps)
    scheduler.step(steps // 2)
    assert f"step {steps // 2 + 1} has {scheduler():.4g} in a run of {steps} steps; it had 0 in" in said
    logged = {row["step"]: row["learning_rate"] for row in longer.read_rows(name, "loss")}
    for step in range(steps // 2, steps):
        assert logged[step + 1] == pytest.approx(scheduler(), rel=1e-12)
        scheduler.step()


def test_following_the_printed_advice_continues_an_early_stopped_run(longer):
    assert "step 2: eval_loss" in longer.said("patience") and "step 3: " not in longer.said("patience")
    assert "resuming from out/patience/checkpoint-2" in longer.said("patience longer")
    assert longer.read_rows("patience", "eval_loss")[-1]["step"] == 4


def test_following_the_printed_advice_resumes_with_another_configuration(longer):
    """The third way that the refusal names; the first two are other runs."""
    assert "learning_rate was 0.01, is 0.003" in longer.said("another", code=1)
    said = longer.said("another all the same")
    assert "learning_rate was 0.01, is 0.003" in said and "resuming as requested" in said and "done: 6 steps" in said
    assert "step 4 has 0.0015 in a run of 6 steps; it had 0 in the run of 3 steps" in said


def test_default_lengths_fit_the_model(stage):
    for name in ("full", "pretrain"):
        assert stage.said(name).count("the model was made for 256 tokens (max_position_embeddings)") == 1
    assert "--src_length 113 (default 128) and --tgt_length 143 (default 160)" in stage.said("full")
    assert "--max_seq_length 256 (default 1024)" in stage.said("pretrain")
    assert "--src_length 111 (default 128) and --tgt_length 139 (default 160)" in stage.said(
        "p_tuning"
    )  # 6 are virtual
    # A length was requested.
    assert "--src_length + --tgt_length asks for sequences of 257" in stage.said("too long", code=2)


@pytest.fixture(scope="module")
def alone(stage) -> Stage:
    """Every adapter by its folder alone, from another folder: evaluated, and trained further."""
    elsewhere = stage.folder / "elsewhere"
    elsewhere.mkdir()
    data, commands = stage.folder / "data", {}
    for name in ADAPTERS:
        adapter = f"../out/{name}"
        more = {"dataset_name_or_path": data, "report_to": "none", "device": "cpu", "logging_steps": 1}
        words = make_flags(model_name_or_path=adapter, do_eval=1, output_dir=f"../out/{name}-alone", **more)
        commands[f"{name} alone"] = ["finetune_generation.py", *words]
        merged = {"merge_weights": 1} if name == "lora" else {}
        words = make_flags(
            model_name_or_path=adapter, do_train=1, max_steps=2, output_dir=f"../out/{name}-on", **more, **merged
        )
        commands[f"{name} on"] = ["finetune_generation.py", *words]
    stage.run(commands, elsewhere)
    return stage


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_folder_is_enough_to_evaluate_and_train_further(alone, name):
    said = alone.said(f"{name} alone")
    assert f"../out/{name} is an adapter" in said and f"its base {BASE} is taken from {alone.folder / BASE}" in said
    last = alone.read_rows(name, "eval_loss")
    # Of its own training: the run may have been extended since.
    trained = next(row for row in last if row["step"] == 2)
    final = last[-1]
    found = alone.read_rows(f"{name}-alone", "eval_loss")[-1]["eval_loss"]
    assert found == pytest.approx((final if final["step"] > 2 else trained)["eval_loss"], rel=1e-6)
    alone.said(f"{name} on")
    settings = [json.loads((alone.folder / "out" / n / "adapter.json").read_text()) for n in (name, f"{name}-on")]
    assert settings[0]["settings"] == settings[1]["settings"] and settings[0]["method"] == settings[1]["method"]
    assert settings[0]["base"]["fingerprint"] == settings[1]["base"]["fingerprint"] != ""
    assert (alone.folder / "out" / f"{name}-on" / "merged" / "config.json").exists() == (name == "lora")
