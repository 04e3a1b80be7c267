"""Adapters and bases that are not merged."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from helpers import make_adapter, make_tiny_model
from oarlock.errors import ConfigError, ModelError
from oarlock.merge.inputs import AdapterMix
from oarlock.merge.merge import MergeOptions, merge
from oarlock.peft.adapter_folder import ADAPTER_FILE, Base
from oarlock.peft.open_adapter import open_adapter
from oarlock.peft.prefix_tuning import Prefix
from oarlock.weights.shard_index import INDEX

# refusals


def rewrite(folder: Path, change) -> None:
    path = folder / "peft_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "np"})


FIRST = "llama.layers.0.mlp.down_proj.lora_A"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: {k: v for k, v in arrays.items() if k != FIRST}, f"it lacks {FIRST}"),
        (lambda arrays: arrays | {"llama.layers.7.mlp.up_proj.lora_A": arrays[FIRST]}, "it has llama.layers.7"),
        (lambda arrays: arrays | {FIRST: arrays[FIRST][:5].copy()}, rf"{FIRST} is \[5, 4\], the model needs \[64, 4\]"),
    ],
)
def test_an_adapter_of_another_model_is_refused(bases, tmp_path, change, message):
    adapter = make_adapter(bases["llama"], tmp_path / "adapter")
    rewrite(adapter, change)
    with pytest.raises(ModelError, match=message):
        merge(bases["llama"], AdapterMix.open([adapter]), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_checkpoint_is_refused_with_the_command_that_makes_an_adapter(adapter, tmp_path):
    with pytest.raises(ModelError, match=r"not an adapter folder: adapter\.json is missing$"):
        open_adapter(tmp_path)
    (tmp_path / INDEX).write_text("{}")  # as in a checkpoint of full training, which holds no adapter
    with pytest.raises(ModelError, match=r"not an adapter folder: adapter\.json is missing$"):
        open_adapter(tmp_path)
    shutil.copyfile(adapter / ADAPTER_FILE, tmp_path / ADAPTER_FILE)
    with pytest.raises(ModelError, match=r"`oarlock checkpoint consolidate .* ADAPTER` makes"):
        open_adapter(tmp_path)


def test_another_base_is_refused(bases, adapter, tmp_path):
    """Other values, and other shapes if there is no fingerprint."""
    other = make_tiny_model(tmp_path / "other", initializer_range=0.2)
    mix = AdapterMix.open([adapter])
    with pytest.raises(ModelError, match="is not the base of this adapter"):
        merge(other, mix, tmp_path / "merged")
    wide = make_tiny_model(tmp_path / "wide", intermediate_size=96)
    unmarked = dataclasses.replace(mix, base=Base.from_folder(str(wide), wide))
    with pytest.raises(ModelError, match=r"down_proj.lora_A is \[64, 4\], the model needs \[96, 4\]"):
        merge(wide, unmarked, tmp_path / "merged")
    elsewhere = make_adapter(other, tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="have different bases"):
        AdapterMix.open([adapter, elsewhere])
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*"))


def test_unmergeable_inputs_are_refused(bases, adapter, tmp_path):
    prefix = make_adapter(bases["llama"], tmp_path / "prefix", Prefix(3))
    with pytest.raises(ModelError, match="was trained with prefix: only LoRA adapters"):
        AdapterMix.open([prefix])
    with pytest.raises(ConfigError, match=r"1 adapter\(s\) and 2 weight\(s\)"):
        AdapterMix.open([adapter], [0.5, 0.5])
    with pytest.raises(ConfigError, match="finite"):
        AdapterMix.open([adapter], [float("nan")])
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="is not empty"):
        merge(bases["llama"], AdapterMix.open([adapter]), tmp_path / "merged")
    merge(bases["llama"], AdapterMix.open([adapter]), tmp_path / "merged", MergeOptions(proof=False, replace=True))
    assert not (tmp_path / "merged" / "mine.txt").exists() and (tmp_path / "merged" / "config.json").exists()


def test_a_full_disk_leaves_nothing(bases, adapter, tmp_path, monkeypatch):
    from oarlock.weights import save as module

    mix, output = AdapterMix.open([adapter]), tmp_path / "merged"
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
    with pytest.raises(ModelError, match="GB are free"):
        merge(bases["llama"], mix, output)
    monkeypatch.undo()

    def full(tensors, folder, *_):
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("oarlock.merge.merge.write_weights", full)
    with pytest.raises(ModelError, match="merged: the merged model could not be written: No space left"):
        merge(bases["llama"], mix, output)
    assert not list(tmp_path.iterdir())
