"""Adapters saved by PEFT are accepted wherever an adapter is, with PEFT's logits.

PEFT and transformers run in the Python of scripts/parity_env.sh, in one process (transformers_peer.py).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import logits_of, make_tiny_tokenizer
from oarlock.errors import ConfigError, ModelError
from oarlock.export.peft import export_peft
from oarlock.merge.inputs import AdapterMix
from oarlock.merge.merge import merge
from oarlock.model_config.load import find_model_class, read_config
from oarlock.models.build import ModelSource, build_model
from oarlock.models.load_finetuned import load_finetuned
from oarlock.peft.lora import LoRA
from oarlock.peft.open_adapter import open_adapter
from oarlock.serve.engine.loading import read_adapters

PEER = Path(__file__).with_name("transformers_peer.py")
IDS = np.random.default_rng(3).integers(1, 512, (2, 12))
_TOKENS = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
BASES = {
    "llama": _TOKENS
    | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "max_position_embeddings": 256},
    "opt": _TOKENS | {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                      "word_embed_proj_dim": 32, "max_position_embeddings": 256},
}  # fmt: skip
_QV = {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj", "q_proj"]}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "two": ("llama", _QV),
    "all": ("llama", {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "lora_dropout": 0.1}),
    "expression": ("llama", {"r": 2, "lora_alpha": 4, "target_modules": r".*\.(up|down)_proj"}),
    "rslora": ("llama", _QV | {"use_rslora": True}),
    "one layer": ("llama", _QV | {"layers_to_transform": [1]}),
    "patterns": ("llama", _QV | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 16}}),
    "of opt": ("opt", {"r": 2, "lora_alpha": 4, "target_modules": ["fc1", "out_proj"]}),
    "dora": ("llama", _QV | {"use_dora": True}),
    "head": ("llama", _QV | {"modules_to_save": ["lm_head"]}),
    "biases": ("llama", _QV | {"lora_bias": True}),
    "embedding": ("llama", _QV | {"target_modules": ["q_proj", "embed_tokens"]}),
    "output": ("llama", _QV | {"target_modules": ["q_proj", "lm_head"]}),
}
REFUSED = {
    "dora": "use_dora is True",
    "head": r"modules_to_save is \['lm_head'\]",
    "biases": "lora_bias is True",
    "embedding": "embed_tokens.* is neither A nor B",
    "output": "lm_head.* is neither A nor B",
}
READ = [name for name in ADAPTERS if name not in REFUSED]


class World:
    """Every base and adapter, made once."""

    def __init__(self, root: Path, python: str) -> None:
        self.root, jobs = root, []
        for name, about in BASES.items():
            jobs.append({"make": {"model_type": name, **about}, "ids": IDS.tolist(), "folder": f"{root}/{name}"})
        for name, (base, settings) in ADAPTERS.items():
            jobs.append(
                {"peft": settings, "ids": IDS.tolist(), "folder": f"{root}/{base}", "adapter": f"{root}/peft/{name}"}
            )
        for i, job in enumerate(jobs):
            job["out"] = f"{root}/said/{i}"
        (root / "said").mkdir()
        (root / "jobs.json").write_text(json.dumps(jobs))
        done = subprocess.run(
            [python, str(PEER), str(root / "jobs.json")], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = [np.load(f"{job['out']}.npz")["scores"] for job in jobs]
        self.scores = dict(zip([*BASES, *ADAPTERS], found, strict=True))
        for name in BASES:
            make_tiny_tokenizer(root / name)

    def adapter(self, name: str) -> Path:
        return self.root / "peft" / name

    def base(self, name: str) -> Path:
        return self.root / ADAPTERS[name][0]


@pytest.fixture(scope="module")
def world(tmp_path_factory, parity_python) -> World:
    return World(tmp_path_factory.mktemp("world"), parity_python)


def compute_logits(model) -> np.ndarray:
    return logits_of(model, IDS)


@pytest.mark.parametrize("name", READ)
def test_a_peft_adapter_can_be_asked_trained_merged_and_served(world, name, tmp_path):
    wanted, base, adapter = world.scores[name], world.base(name), world.adapter(name)
    assert np.abs(wanted - world.scores[ADAPTERS[name][0]]).max() > 0.05
    tuned = load_finetuned(str(adapter), str(base))
    np.testing.assert_allclose(compute_logits(tuned.model), wanted, atol=1e-4, rtol=0)
    source = ModelSource(base, read_config(base), from_weights=True)
    about = open_adapter(adapter).map_to_model(find_model_class(source.config), source.config).settings
    method = LoRA(about["r"], about["alpha"], about["dropout"], tuple(reversed(about["targets"])), about["rslora"])
    again = build_model(source, method=method, adapter=adapter)  # as --adapter_name_or_path does
    np.testing.assert_allclose(compute_logits(again), wanted, atol=1e-4, rtol=0)
    assert merge(base, AdapterMix.open([adapter]), tmp_path / "merged").difference < 1e-4
    merged = build_model(ModelSource(tmp_path / "merged", read_config(tmp_path / "merged"), True))
    np.testing.assert_allclose(compute_logits(merged), wanted, atol=1e-4, rtol=0)
    served = read_adapters({"a": adapter}, base, read_config(base))["a"]
    plain = {key: value.numpy() for key, value in build_model(source).state_dict().items()}
    together = {key: value.numpy() for key, value in merged.state_dict().items()}
    for layer, (a, b) in served.items():
        np.testing.assert_allclose(plain[f"{layer}.weight"] + a @ b, together[f"{layer}.weight"], atol=1e-5)


def test_adapters_are_converted_back_to_peft(world, tmp_path):
    made = export_peft(world.adapter("two"), tmp_path / "again", str(world.base("two")))
    before = load_file(world.adapter("two") / "adapter_model.safetensors")
    after = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert set(made.names) == set(before) == set(after)
    assert all(np.array_equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", REFUSED)
def test_tensors_other_than_a_and_b_are_refused_by_name(world, name):
    with pytest.raises(ModelError, match=REFUSED[name]):
        load_finetuned(str(world.adapter(name)), str(world.base(name)))
    with pytest.raises(ModelError, match=REFUSED[name]):
        merge(world.base(name), AdapterMix.open([world.adapter(name)]), world.root / "never")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alpha_pattern": {"(a+)+b": 3}}, "only layer names are supported"),
        ({"something_new": 3}, "something_new is 3"),
        ({"r": 0}, "r must be greater than or equal to 1; got 0"),
    ],
)
def test_unsupported_fields_are_refused(world, tmp_path, fields, words):
    folder = shutil.copytree(world.adapter("two"), tmp_path / "a")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ModelError, match=words):
        open_adapter(folder)


def test_a_missing_or_different_base_is_refused(world, tmp_path):
    folder = shutil.copytree(world.adapter("two"), tmp_path / "a")
    path = folder / "adapter_config.json"
    for recorded, why in (("/gone/model", "without a fingerprint"), ("gone/model", "there is no such folder")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": recorded}))
        with pytest.raises(ModelError, match=rf"its base is recorded as '{recorded}'.*{why}.*Name it: --base DIR"):
            load_finetuned(str(folder))
    np.testing.assert_allclose(
        compute_logits(load_finetuned(str(folder), str(world.base("two"))).model), world.scores["two"], atol=1e-4
    )
    with pytest.raises((ModelError, ConfigError), match=r"this opt has no layer"):
        load_finetuned(str(world.adapter("all")), str(world.root / "opt"))
    other = load_file(folder / "adapter_model.safetensors")
    save_file(
        {key: value[:, :16] if "lora_A" in key else value for key, value in other.items()},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(ModelError, match=r"the model needs \[4, 32\]"):
        load_finetuned(str(folder), str(world.base("two")))
