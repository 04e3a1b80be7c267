"""Hostile or damaged adapters and generation settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from oarlock.errors import ConfigError, ModelError
from oarlock.model_config.generation_config import read_generation_config
from oarlock.peft.adapter_base import find_base
from oarlock.peft.open_adapter import open_adapter


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"eos_token_id": "x"}, "eos_token_id must be"),
        ({"eos_token_id": 10**12}, "eos_token_id must be"),
        ({"temperature": []}, "temperature must be a number"),
        ({"do_sample": "__class__"}, "do_sample must be true or false"),
    ],
)
def test_generation_settings_are_type_checked(tmp_path, content, words):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=words):
        read_generation_config(tmp_path)


_SETTINGS = {"r": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["q_proj"], "rslora": False, "plus_scale": 1.0,
             "quantization": None, "scaling": 2.0}  # fmt: skip


_A = "llama.layers.0.self_attn.q_proj.lora_A"


def write_adapter(
    folder: Path, tensor: np.ndarray | None = None, settings: Any = None, base: Any = None, **fields: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": 1, "method": "lora", "settings": _SETTINGS | (settings or {}),
               "base": base or {"name": "base", "fingerprint": "0" * 64}}  # fmt: skip
    (folder / "adapter.json").write_text(json.dumps(content | fields))
    tensors = {_A: np.zeros((32, 2), np.float32) if tensor is None else tensor}
    (folder / "peft_model.safetensors").write_bytes(save(tensors, {"format": "np"}))
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"settings": {"r": -1}}, "r must be greater than or equal to 1"),
        ({"settings": {"r": 10**9}}, "r must be less than"),
        ({"settings": {"r": 2.5}}, "r must be an integer"),
        ({"settings": {"targets": "q_proj"}}, "targets must be a list"),
        ({"settings": {"dropout": 1.5}}, "dropout must be less than 1"),
        ({"settings": {"quantization": {"algorithm": "__class__"}}}, "quantization.algorithm must be 'nf4' or 'fp4'"),
        ({"settings": {"quantization": {"a": 1}}}, "settings.quantization: a is "),
        ({"settings": {"r": 4}}, r"lora_A is \[32, 2\], and adapter.json says a rank of 4"),
        ({"method": ["lora"]}, "method must be"),
        ({"method": "__class__"}, "method must be"),
        ({"format": "1"}, "format must be an integer"),
        ({"settings": None, "base": {"name": 5, "fingerprint": ""}}, "base.name must be a string"),
        ({"base": {"name": "x"}}, "fingerprint is missing"),
        ({"tensor": np.zeros((32, 2), np.int32)}, "is stored in int32, which is not a type of adapter weights"),
        ({"tensor": np.zeros(64, np.float32)}, r"is \[64\]"),
    ],
)
def test_hostile_adapters_are_refused(tmp_path, arguments, words):
    with pytest.raises(ModelError, match=words) as error:
        open_adapter(write_adapter(tmp_path / "a", **arguments))
    assert str(tmp_path) in str(error.value)


def test_adapter_values_that_are_not_finite_are_named(tmp_path):
    found = open_adapter(write_adapter(tmp_path / "a", np.full((32, 2), np.nan, np.float32)))
    with pytest.raises(ModelError, match="lora_A holds values that are not finite numbers"):
        found.value(_A, (32, 2))


def test_an_adapter_can_not_choose_folders_or_hubs(folders, tmp_path, monkeypatch):
    def never(*_: Any) -> None:
        raise AssertionError("a hub was asked")

    monkeypatch.setattr("oarlock.model_config.model_folder._download", never)
    elsewhere = str(folders.root / "llama")
    for name, mark in (("some/model", "0" * 64), ("gone", ""), ("", "unknown")):
        found = open_adapter(write_adapter(tmp_path / "a", base={"name": name, "fingerprint": mark}))
        with pytest.raises(ModelError, match=r"nothing is downloaded because an adapter names it\. Name it"):
            find_base(found, "Name it")
    for name, mark in ((elsewhere, "unknown"), (elsewhere, ""), (f"../../{folders.root.name}/llama", "unknown")):
        found = open_adapter(write_adapter(tmp_path / "a", base={"name": name, "fingerprint": mark}))
        with pytest.raises(ModelError, match=r"not opened because an adapter names it\. Name it"):
            find_base(found, "Name it")
    found = open_adapter(write_adapter(tmp_path / "a", base={"name": elsewhere, "fingerprint": "0" * 64}))
    assert find_base(found, "Name it") == Path(elsewhere)  # the loader compares the fingerprint
    with pytest.raises((ModelError, ConfigError), match="not the base of this adapter"):
        from oarlock.models.load_finetuned import load_finetuned

        load_finetuned(str(tmp_path / "a"))
