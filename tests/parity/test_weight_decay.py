"""The trained and the decayed parameters are those of transformers' Trainer, in every family that it has."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from families import FAMILIES, family_config
from helpers import make_flags, make_norms_and_biases_nontrivial
from oarlock.config import FinetuneConfig, LoadedConfig, load_config
from oarlock.families.registry import FAMILIES as REGISTRY
from oarlock.families.registry import HF_CONFIGS
from oarlock.model_config.hf_config import to_hugging_face
from oarlock.model_config.load import find_model_class
from oarlock.models.build import ModelSource, build_model, count_parameters
from oarlock.peft.lora import LoRA
from oarlock.peft.p_tuning import PTuning
from oarlock.peft.prefix_tuning import Prefix
from oarlock.train.run_training import make_trainer
from oarlock.train.setup import connect_ranks, start_run
from oarlock.weights.hf_names import list_hf_names
from oarlock.weights.layout import parameter_shards

RATE, DECAY = 0.1, 0.5
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in FAMILIES} | {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "gemma untied": ("gemma", {"tie_word_embeddings": False}),
    "opt untied": ("opt", {"tie_word_embeddings": False}),
}
THEIRS = [name for name, (family, _) in CHANGES.items() if family in HF_CONFIGS]
METHODS: dict[str, Any] = {"lora": LoRA(2, 4.0), "prefix": Prefix(3), "p_tuning": PTuning(3, "lstm")}


def config_of(name: str):
    family, changes = CHANGES[name]
    return family_config(family, use_cache=False, **changes)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, parity_python) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("decay")
    configs = {name: to_hugging_face(config_of(name), "float32", name) for name in THEIRS}
    (folder / "configs.json").write_text(json.dumps(configs))
    peer = Path(__file__).with_name("decay_peer.py")
    command = [parity_python, str(peer), str(folder / "configs.json"), str(folder / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


class Trained:
    """A trainer's model before and after a step with zero gradients, so that only the decay changes it."""

    def __init__(self, name: str, folder: Path, method: Any = None, **options: Any) -> None:
        words = make_flags(
            do_train=1, model_name_or_path=folder, dataset_name_or_path=folder, output_dir=folder / "out",
            learning_rate=RATE, weight_decay=DECAY, lr_scheduler_type="constant", warmup_ratio=0, max_steps=1,
            report_to="none", device="cpu", **options,
        )  # fmt: skip
        run = start_run(LoadedConfig(load_config(FinetuneConfig, words).config))
        source = ModelSource(folder, config_of(name), from_weights=False)
        connect_ranks(run, source, 32)
        self.model = make_norms_and_biases_nontrivial(build_model(source, method=method))
        trainer = make_trainer(
            run, self.model, None, method=method, order=None, template=None, tokenizer=None, flops=None,
            data_fingerprint="",
        )  # fmt: skip
        trainer.create_optimizer_and_scheduler(1)
        self.tensors = {h.name: h.tensor for h in parameter_shards(self.model) if not h.tensor.stop_gradient}
        for key, tensor in self.tensors.items():
            if key.endswith("lora_B"):  # starts at 0, where decay has no effect
                tensor.set_value(paddle.full_like(tensor, 0.5))
        before = {key: tensor.numpy() for key, tensor in self.tensors.items()}
        for tensor in self.tensors.values():
            if hasattr(tensor, "trainable"):
                tensor.grad = paddle.zeros_like(tensor)
        trainer.optimizer.step()
        self.decayed = set()
        for key, tensor in self.tensors.items():
            after = tensor.numpy()
            if np.array_equal(after, before[key]):
                continue
            np.testing.assert_allclose(after, before[key] * (1 - RATE * DECAY), rtol=1e-5, err_msg=key)
            self.decayed.add(key)


@pytest.mark.parametrize("name", THEIRS)
def test_decayed_parameters_equal_transformers(name, theirs, tmp_path):
    found = Trained(name, tmp_path)
    names = {
        mapping.target_name: there
        for (there, *_), mapping in list_hf_names(find_model_class(found.model.config), found.model.config)
    }
    assert {names[key] for key in found.decayed} == set(theirs[name]["decayed"])


@pytest.mark.parametrize("name", THEIRS)
def test_the_number_of_trained_parameters_equals_transformers(name, theirs):
    config = config_of(name)
    model = build_model(ModelSource(Path(name), config, from_weights=False))
    names = {mapping.target_name: there for (there, *_), mapping in list_hf_names(find_model_class(config), config)}
    sizes = {
        names[h.name]: int(np.prod(h.tensor.shape)) for h in parameter_shards(model) if hasattr(h.tensor, "trainable")
    }
    assert sizes == theirs[name]["sizes"]
    assert count_parameters(model)[1] == sum(theirs[name]["sizes"].values())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in HF_CONFIGS])
def test_families_that_transformers_lacks(name, tmp_path):
    """Matrices and embeddings decay; norms and biases, which have one axis, do not."""
    found = Trained(name, tmp_path, fused_ops="false")
    assert found.decayed == {key for key, tensor in found.tensors.items() if len(tensor.shape) > 1}


@pytest.mark.parametrize(
    ("name", "method"),
    [(n, m) for n in ("llama", "opt", "bloom", "gptj") for m in METHODS if m != "prefix" or REGISTRY[n].kv_axes],
)
def test_adapters_decay_except_their_biases(name, method, tmp_path):
    """As with PEFT under transformers' Trainer."""
    found = Trained(name, tmp_path, METHODS[method])
    assert found.decayed == {key for key in found.tensors if not key.endswith(".bias")}
    assert all("lora" in key or "prefix" in key or "prompt" in key for key in found.tensors)
