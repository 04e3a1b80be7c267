"""Twenty steps compared with transformers' Trainer and PEFT: losses, learning rates, gradient norms and final weights.

transformers makes the models (norms not 1, biases not 0) and trains them in one process (trainer_peer.py); the real
command trains the same folders on the same samples in the same order, all runs in one process (e2e/warm_runs.py).
Micro-batches have uneven numbers of trained tokens, gradients are clipped, weights decay, the rate warms up and falls.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers import make_flags, make_tiny_tokenizer, read_rows
from oarlock.config import FinetuneConfig, load_config
from oarlock.config.shared import ScheduleSection
from oarlock.data.corpus.order import SampleOrder
from oarlock.data.examples.dataset import load_finetune_data
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.export.convert import ConvertOptions, convert
from oarlock.export.peft import export_peft
from oarlock.train.optim.schedule import make_scheduler
from support.tiny_configs import TINY_CONFIGS

Weights = dict[str, np.ndarray]
PEER = Path(__file__).with_name("trainer_peer.py")
WARM = Path(__file__).resolve().parents[1] / "e2e" / "warm_runs.py"
STEPS, BATCH, MICRO = 20, 2, 3

_TOKENS = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SIZES = _TOKENS | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES},
    "qwen2": {"model_type": "qwen2", **_SIZES},
    "qwen2 tied": {"model_type": "qwen2", **_SIZES, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_SIZES, "sliding_window": None},
    "gemma": {"model_type": "gemma", **_SIZES, "head_dim": 16},
    "opt": {
        "model_type": "opt", **_TOKENS, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "init_std": 0.1,
        "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 256, "dropout": 0.0,
    },
    "bloom": {"model_type": "bloom", **_TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
    "gptj": {
        "model_type": "gptj", **_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4,
        "initializer_range": 0.1,
    },
}  # fmt: skip
RUNS = [f"{name}/{method}" for name in MODELS for method in ("full", "lora")]
NEWER = [name for name in TINY_CONFIGS if name not in MODELS]
MODELS |= {name: TINY_CONFIGS[name] for name in NEWER}
# Texts are short for longrope: transformers decides which frequencies a padded batch gets, we decide for every text.
_SHORT = {"original_max_position_embeddings": 256}
MODELS["phi3"] = MODELS["phi3"] | _SHORT | {
    "rope_parameters": MODELS["phi3"]["rope_parameters"] | _SHORT, "max_position_embeddings": 512
}  # fmt: skip
# Adapters of packed projections, in layers with further norms, and of latent attention.
RUNS += [f"{name}/full" for name in NEWER]
RUNS += [f"{name}/lora" for name in ("phi3", "qwen3", "gemma2", "deepseek_v3")]
# PEFT's "all-linear" is also the routers and the experts, which PEFT adapts as one parameter each.
TARGETS = {"deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]}
RATE, CLIP = 1e-3, 0.25
# Ours (two options) and theirs (one: a ratio below 1, otherwise steps).
SCHEDULES = {
    "full": ({"lr_scheduler_type": "cosine", "warmup_ratio": 0.17}, {"lr_scheduler_type": "cosine", "warmup_steps": 0.17}),
    "lora": ({"lr_scheduler_type": "linear", "warmup_steps": 3}, {"lr_scheduler_type": "linear", "warmup_steps": 3}),
}  # fmt: skip
BOTH = {
    "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": MICRO, "max_steps": STEPS,
    "learning_rate": RATE, "weight_decay": 0.1, "max_grad_norm": CLIP, "adam_beta2": 0.95,
}  # fmt: skip
# Schedules of every shape, by transformers' names.
SCHEDULE_CASES: list[dict[str, Any]] = [
    {"steps": steps, "lr_scheduler_type": shape, "warmup_steps": warmup, "learning_rate": 3e-4}
    for shape in ("linear", "cosine", "constant_with_warmup")
    for steps in (1, 2, 3, 7, 10, 50, 99, 100, 333)
    for warmup in (0, 0.01, 0.03, 0.1, 0.29, 0.5, 0.999, 1, 2, 9, 90)
    if warmup < steps
] + [{"steps": 20, "lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate": 3e-4}]
# Weights are float32 numbers of about 1 after twenty steps, each rounded to 6e-8 of its size and summed in another
# order: their difference is a few such roundings. The measured largest is 4e-7.
WEIGHTS = 2e-6
# A bias of the keys adds the same to all scores of a query if there is no rotary embedding: softmax cancels it,
# its gradient is only rounding, and Adam makes full-size steps of that. It changes no output. GLM-4 rotates half a head,
# and Llama 3's slowest components hardly turn in short texts. transformers does not train the bias of DeepSeek's router.
NO_GRADIENT = {
    "opt": ("k_proj.bias",), "bloom": ("query_key_value.bias",), "glm4": ("k_proj.bias",), "llama3": ("k_proj.bias",),
    "deepseek_v3": ("e_score_correction_bias",),
}  # fmt: skip


class Peers:
    """The results of both sides, by run."""

    def __init__(self, folder: Path, parity_python: str) -> None:
        self.folder, self.python = folder, parity_python
        self.data = folder / "train.jsonl"
        words = (1, 40, 3, 25, 2, 60, 1, 14)
        records = [
            {"src": f"count to {i}", "tgt": " ".join(str(i * n) for n in range(words[i % 8]))} for i in range(100)
        ]
        self.data.write_text("\n".join(map(json.dumps, records)))
        places = {name: {"folder": str(self.model(name)), "adapter": str(self.adapter(name))} for name in MODELS}
        self.ask_peer(
            {
                name: place | {"make": MODELS[name], "seed": len(name), "targets": TARGETS.get(name, "all-linear")}
                for name, place in places.items()
            }
        )
        for name in MODELS:
            make_tiny_tokenizer(self.model(name))
        jobs = {run: self._their_job(run) for run in RUNS}
        self.theirs = self.ask_peer(jobs | {"schedules": {"out": str(folder), "schedules": SCHEDULE_CASES}})
        self.ours = self._train_ours()

    def ask_peer(self, jobs: dict[str, Any]) -> dict[str, Any]:
        asked, answered = self.folder / "jobs.json", self.folder / "answers.json"
        asked.write_text(json.dumps(jobs))
        words = [self.python, str(PEER), str(asked), str(answered)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(answered.read_text())

    def model(self, name: str) -> Path:
        return self.folder / "models" / name.replace(" ", "-")

    def adapter(self, name: str) -> Path:
        """The PEFT adapter that both sides start from."""
        return self.folder / "adapters" / name.replace(" ", "-")

    def out(self, run: str, side: str) -> Path:
        return self.folder / side / run.replace(" ", "-").replace("/", "-")

    def words(self, run: str) -> list[str]:
        """Arguments of our command."""
        name, method = run.split("/")
        options: dict[str, Any] = {
            "model_name_or_path": self.model(name), "dataset_name_or_path": self.data, "src_length": 64,
            "tgt_length": 64, "do_train": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "device": "cpu", "output_dir": self.out(run, "ours"), **BOTH, **SCHEDULES[method][0],
        }  # fmt: skip
        if method == "lora":
            options["adapter_name_or_path"] = self.adapter(name)  # which says rank and layers
        return make_flags(**options)

    def _their_job(self, run: str) -> dict[str, Any]:
        name, method = run.split("/")
        config = load_config(FinetuneConfig, self.words(run)).config
        examples = load_finetune_data(config.data, load_tokenizer(str(self.model(name)))).train
        order, samples = SampleOrder(len(examples), config.runtime.seed), []
        for position in range(STEPS * BATCH * MICRO):
            example = examples[order[position]]
            last = example.labels[-1]  # if it is not trained, it is not read either
            samples.append({"input_ids": [*example.input_ids, max(0, last)], "labels": [-100, *example.labels]})
        data = self.folder / "samples" / f"{name}.json"
        data.parent.mkdir(exist_ok=True)
        data.write_text(json.dumps(samples))
        job = {
            "folder": str(self.model(name)), "data": str(data), "out": str(self.out(run, "theirs")),
            "arguments": BOTH | SCHEDULES[method][1],
        }  # fmt: skip
        return job | ({"adapter": str(self.adapter(name))} if method == "lora" else {})

    def _train_ours(self) -> dict[str, Any]:
        spec = [
            {"name": run, "words": ["finetune_generation.py", *self.words(run)], "folder": str(self.out(run, "log"))}
            for run in RUNS
        ]
        asked, answered = self.folder / "spec.json", self.folder / "ours.json"
        asked.write_text(json.dumps(spec))
        words = [sys.executable, str(WARM), str(asked), str(answered)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(answered.read_text())

    def log(self, run: str) -> dict[str, np.ndarray]:
        """loss, learning_rate and grad_norm of our steps."""
        assert self.ours[run]["codes"] == [0], self.ours[run]["said"][-4000:]
        found = [row for row in read_rows(self.out(run, "ours") / "metrics.jsonl") if "loss" in row]
        return {key: np.asarray([row[key] for row in found]) for key in ("loss", "learning_rate", "grad_norm")}

    def weights(self, run: str) -> tuple[Weights, Weights, Weights]:
        """Initial weights, our final weights and those of transformers, by transformers' names."""
        name, method = run.split("/")
        file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
        begin = self.model(name) if method == "full" else self.adapter(name)
        converted = self.out(run, "converted")
        if not converted.exists():
            if method == "full":
                convert(self.out(run, "ours"), converted, "hf", ConvertOptions(proof=False))
            else:
                export_peft(self.out(run, "ours"), converted)
        return load_file(begin / file), load_file(converted / file), load_file(self.out(run, "theirs") / file)

    def difference(self, run: str) -> float:
        """The largest difference over all weights that have a gradient."""
        _, ours, theirs = self.weights(run)
        without = NO_GRADIENT.get(run.split("/")[0], ())
        return max(float(np.abs(ours[key] - theirs[key]).max()) for key in theirs if not key.endswith(without))


@pytest.fixture(scope="module")
def peers(tmp_path_factory, parity_python) -> Peers:
    return Peers(tmp_path_factory.mktemp("peers"), parity_python)


def relative_difference(found: Any, wanted: Any) -> float:
    return float(np.abs(np.asarray(found) / np.asarray(wanted) - 1).max())


@pytest.mark.parametrize("run", RUNS)
def test_losses_and_gradient_norms_equal_transformers(peers, run):
    log, theirs = peers.log(run), peers.theirs[run]
    assert relative_difference(log["loss"], theirs["losses"]) <= 1e-6
    np.testing.assert_allclose(log["learning_rate"], theirs["rates"], rtol=1e-12, atol=0)
    assert relative_difference(log["grad_norm"], theirs["norms"]) <= 1e-5
    # Guards the test itself: clipping is always active, and the rate rises and falls.
    assert min(theirs["norms"]) > CLIP and len(theirs["losses"]) == STEPS
    assert log["learning_rate"][0] == 0 and 0 < log["learning_rate"][-1] < max(log["learning_rate"]) == RATE


@pytest.mark.parametrize("run", RUNS)
def test_final_weights_equal_transformers(peers, run, record_property):
    begin, ours, theirs = peers.weights(run)
    record_property("training", peers.difference(run))
    assert ours.keys() == theirs.keys()
    for key, wanted in theirs.items():
        free = key.endswith(NO_GRADIENT.get(run.split("/")[0], ()))
        assert np.abs(ours[key] - wanted).max() <= (RATE if free else WEIGHTS), key
        assert free or np.abs(begin[key] - wanted).max() > 100 * WEIGHTS, f"{key} was not trained"
    said = peers.ours[run]["said"]
    assert f" {peers.theirs[run]['trained']:,} of them trainable" in said


def test_learning_rates_of_every_schedule_equal_transformers(peers):
    for case, wanted in zip(SCHEDULE_CASES, peers.theirs["schedules"], strict=True):
        warmup, steps = case["warmup_steps"], case["steps"]
        given = {"warmup_steps": warmup} if isinstance(warmup, int) else {"warmup_ratio": warmup}
        shape = case["lr_scheduler_type"]
        schedule = ScheduleSection(learning_rate=3e-4, lr_scheduler_type=shape, **given)
        scheduler, rates = make_scheduler(schedule, steps), []
        for _ in range(steps):
            rates.append(scheduler())
            scheduler.step()
        np.testing.assert_allclose(rates, wanted, rtol=1e-12, atol=3e-4 * 1e-15, err_msg=str(case))
        if shape == "constant_with_warmup":  # ours warms up a plain constant schedule too, if requested
            constant = make_scheduler(replace(schedule, lr_scheduler_type="constant"), steps)
            assert [(constant(), constant.step())[0] for _ in range(steps)] == rates


def test_the_documented_table(peers, capsys):
    """The figures of docs/benchmarks.md (print them with `pytest -s`); the page names every model that is compared."""
    with capsys.disabled():
        print("\n| model | method | loss | weights |\n|---|---|---|---|")
        for run in RUNS:
            loss = relative_difference(peers.log(run)["loss"], peers.theirs[run]["losses"])
            name, method = run.split("/")
            print(f"| {name} | {method} | {loss:.0e} | {peers.difference(run):.0e} |")
    text = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text()
    assert all(f"| {name} | " in text for name in MODELS)
