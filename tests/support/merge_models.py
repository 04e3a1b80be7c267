"""Bases and adapters for the tests of merging."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from paddlenlp.transformers import AutoModelForCausalLM
from safetensors.numpy import load_file, save_file

from helpers import logits_of

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
IDS = np.random.default_rng(5).integers(0, 128, (2, 9))


def save_as_hugging_face(folder: Path, output: Path, prefix: str) -> Path:
    """Save the same model with transposed matrices, other names, in bfloat16 and in two files."""
    output.mkdir()
    shutil.copy(folder / "config.json", output)
    arrays = {}
    stored = load_file(folder / "model.safetensors")
    if np.array_equal(stored.get("lm_head.weight"), stored[f"{prefix}.embed_tokens.weight"]):
        del stored["lm_head.weight"]  # tied
    for name, values in stored.items():
        if "proj" in name or name == "lm_head.weight":
            values = np.ascontiguousarray(values.T)
        arrays[name.replace(f"{prefix}.", "model.")] = values.astype(ml_dtypes.bfloat16)
    names = sorted(arrays)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: arrays[name] for name in part}, output / f"model-{i}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    (output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return output


def compute_logits(model) -> np.ndarray:
    return logits_of(model, IDS)


def whole_model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype="float32")
