"""Adapters on bfloat16 and float16 checkpoints, the usual published form, in either layout.

They train in float32 (as the precision flags say) and equal adapters trained on the same values in float32; the saved
folders declare their dtype.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import paddle
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from families import family_config, family_model
from helpers import make_flags, make_tiny_tokenizer, read_rows
from oarlock.config import FinetuneConfig, load_config
from oarlock.merge.inputs import AdapterMix
from oarlock.merge.merge import MergeOptions, merge
from oarlock.model_config.load import read_config
from oarlock.models.build import ModelSource, build_model
from oarlock.models.load_finetuned import load_finetuned
from oarlock.peft.lora import LoRA
from oarlock.peft.method import trainable_parameters
from oarlock.peft.p_tuning import PTuning
from oarlock.peft.prefix_tuning import Prefix
from oarlock.peft.quantization import Quantization
from oarlock.train.checkpoint.inspect import consolidate
from oarlock.train.finetune import finetune

_TOKENS = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Saved by transformers: name -> job for the peer.
THEIRS = {
    "llama bfloat16": _TOKENS | _HEADS | {"model_type": "llama", "intermediate_size": 64, "num_key_value_heads": 2},
    "opt float16": _TOKENS | _HEADS | {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
}
# Saved by PaddleNLP.
OURS = ("qwen2 bfloat16", "bloom float16")
BASES = (*THEIRS, *OURS)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": 1, "r": 4},
    "qlora": {"qlora": 1, "r": 4, "qlora_weight_blocksize": 16},
    "prefix": {"prefix_tuning": 1, "num_prefix_tokens": 4},
    "p_tuning": {"p_tuning": 1, "num_virtual_tokens": 4},
}
CASES = [(base, method) for base in BASES for method in METHODS]


class Folders:
    """Bases, the same bases in float32, and records to train on."""

    def __init__(self, root: Path, parity_python: str) -> None:
        self.root, self.data = root, root / "train.jsonl"
        records = [{"src": f"count to {n}", "tgt": " ".join(map(str, range(n)))} for n in range(2, 18)]
        self.data.write_text("\n".join(map(json.dumps, records)))
        jobs = []
        for name, about in THEIRS.items():
            job = {
                "make": about,
                "dtype": name.split()[1],
                "folder": str(root / name),
                "out": str(root / f"{name} out"),
            }
            jobs.append(job | {"noise": 0.2, "ids": [[1, 2, 3]]})
        (root / "jobs.json").write_text(json.dumps(jobs))
        peer = Path(__file__).with_name("transformers_peer.py")
        command = [parity_python, str(peer), str(root / "jobs.json")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        for name in OURS:
            family, dtype = name.split()
            model = family_model(family)
            model.to(dtype=dtype)
            model.config.dtype = dtype
            model.save_pretrained(str(root / name), safe_serialization=True)
        for name in BASES:
            make_tiny_tokenizer(root / name)
            self._widen(root / name, root / f"{name} wide")

    def _widen(self, folder: Path, wide: Path) -> None:
        shutil.copytree(folder, wide)
        file = wide / "model.safetensors"
        with safe_open(file, "np") as opened:
            metadata = opened.metadata()
        as_bits = {n: v.view(ml_dtypes.bfloat16) if v.dtype == np.uint16 else v for n, v in load_file(file).items()}
        save_file({n: v.astype("float32") for n, v in as_bits.items()}, file, metadata)
        config = json.loads((wide / "config.json").read_text())
        config |= {"dtype": "float32"} | ({"torch_dtype": "float32"} if "torch_dtype" in config else {})
        (wide / "config.json").write_text(json.dumps(config))

    def train(self, base: Path, output: Path, **options: Any) -> list[float]:
        """Losses of three steps."""
        words = make_flags(
            do_train=1, model_name_or_path=base, dataset_name_or_path=self.data, output_dir=output, device="cpu",
            per_device_train_batch_size=4, max_steps=3, learning_rate=1e-3, logging_steps=1, save_steps=3,
            report_to="none", src_length=16, tgt_length=48, warmup_ratio=0, disable_tqdm=1, **options,
        )  # fmt: skip
        assert finetune(load_config(FinetuneConfig, words)) == 0
        return [row["loss"] for row in read_rows(output / "metrics.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, parity_python) -> Folders:
    return Folders(tmp_path_factory.mktemp("dtypes"), parity_python)


def stored_types(file: Path) -> set[str]:
    with safe_open(file, "np") as opened:
        return {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("base", "method"), CASES)
def test_an_adapter_on_half_precision_weights_trains_as_on_float32(folders, tmp_path, base, method):
    options = METHODS[method]
    found = folders.train(folders.root / base, tmp_path / "half", **options)
    wide = folders.train(folders.root / f"{base} wide", tmp_path / "wide", **options)
    assert len(found) == 3 and all(map(math.isfinite, found)) and found[2] != found[0]
    assert found == wide
    assert stored_types(tmp_path / "half" / "peft_model.safetensors") == {"F32"}
    assert json.loads((tmp_path / "half" / "adapter.json").read_text())["dtype"] == "float32"
    if method in ("lora", "qlora"):
        assert json.loads((tmp_path / "half" / "lora_config.json").read_text())["dtype"] == "float32"
    tuned = load_finetuned(str(tmp_path / "half"))
    assert {str(parameter.dtype) for parameter in tuned.model.parameters()} == {"paddle.float32"}


@pytest.mark.parametrize("base", BASES)
def test_an_adapter_is_resumed_and_merged(folders, tmp_path, base):
    folders.train(folders.root / base, tmp_path / "first", lora=1, r=4)
    more = folders.train(folders.root / base, tmp_path / "more", lora=1, r=4, adapter_name_or_path=tmp_path / "first")
    assert all(map(math.isfinite, more))
    code, name = {"bfloat16": ("BF16", "bfloat16"), "float16": ("F16", "float16")}[base.split()[1]]
    merge(folders.root / base, AdapterMix.open([tmp_path / "more"]), tmp_path / "merged")
    assert stored_types(tmp_path / "merged" / "model.safetensors") == {code}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == name
    merge(folders.root / base, AdapterMix.open([tmp_path / "more"]), tmp_path / "wide", MergeOptions("float32"))
    assert stored_types(tmp_path / "wide" / "model.safetensors") == {"F32"}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("base", BASES)
def test_full_training_declares_float32_weights(folders, tmp_path, base):
    """In the final folder, and in one made from a checkpoint."""
    found = folders.train(folders.root / base, tmp_path / "full")
    assert found == folders.train(folders.root / f"{base} wide", tmp_path / "wide")
    consolidate(tmp_path / "full" / "checkpoint-3", tmp_path / "whole", 1 << 30)
    for folder in (tmp_path / "full", tmp_path / "whole"):
        assert stored_types(folder / "model.safetensors") == {"F32"}
        content = json.loads((folder / "config.json").read_text())
        assert content["dtype"] == "float32" and content.get("torch_dtype", "float32") == "float32"
        assert read_config(folder).dtype == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(
    "method",
    [LoRA(2, 4.0), LoRA(2, 4.0, quantization=Quantization(block_size=16)), Prefix(3), PTuning(3, "lstm")],
    ids=METHODS,
)
def test_an_adapter_has_the_dtype_of_the_run(family, method, dtype):
    """The dtype of --bf16 or --fp16 with O2 (the optimizer keeps float32 master weights), not that of the checkpoint."""
    for stored, of_run in (("float32", dtype), (dtype, "float32")):
        config = family_config(family, dtype=stored)
        model = build_model(ModelSource(Path(family), config, from_weights=False), of_run, method=method)
        assert {str(parameter.tensor.dtype) for parameter in trainable_parameters(model)} == {f"paddle.{of_run}"}
        assert {str(parameter.dtype) for parameter in model.parameters()} == {f"paddle.{of_run}"}
        assert paddle.get_default_dtype() == "float32"
