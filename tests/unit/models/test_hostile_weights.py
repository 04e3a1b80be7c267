"""Hostile or damaged weight files."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from oarlock.errors import ModelError
from oarlock.model_config.generation_config import read_generation_config
from oarlock.model_config.load import read_config
from oarlock.weights.buffers import all_finite, array_type
from oarlock.weights.weight_folder import WeightFolder
from support.family_folders import build


def rewrite_header(folder: Path, change: Any) -> Path:
    """A folder with a changed header and the same data."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return folder


_EMBEDDING = "llama.embed_tokens.weight"


def _shift_offsets(header: dict[str, Any], by: int) -> None:
    begin, end = header[_EMBEDDING]["data_offsets"]
    header[_EMBEDDING]["data_offsets"] = [begin + by, end + by]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: _shift_offsets(h, -4), "tensor|overlaps|bytes"),
        (lambda h: h[_EMBEDDING].update(data_offsets=[-4, 0]), "data_offsets must be .begin, end."),
        (lambda h: h[_EMBEDDING].update(shape=[512, 33]), "F32 of shape"),
        (lambda h: h[_EMBEDDING].update(shape=[2**62, 2**62]), "its shape must be"),
        (lambda h: h[_EMBEDDING].update(dtype="I32"), "quantized weights"),
        (lambda h: h[_EMBEDDING].update(dtype="Q4"), "not a safetensors dtype"),
        (lambda h: h["llama.norm.weight"].update(dtype="F8_E4M3", shape=[128]), "F8_E4M3, which is not supported"),
        (lambda h: h.pop(_EMBEDDING), "hole|belong to no tensor|leaves"),
        (lambda h: h.update(__metadata__={"format": 5}), "an object of strings"),
        (lambda h: h.update(__metadata__={"format": "__class__"}), "another framework"),
        (lambda h: h.update({"extra.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "extra.weight"),
    ],
)
def test_forged_headers_are_refused(folders, tmp_path, change, words):
    with pytest.raises(ModelError, match=words):
        build(rewrite_header(folders.copy(tmp_path), change))


@pytest.mark.parametrize("by", [-1, -5000, 1, 4096])
def test_files_of_the_wrong_size_are_refused(folders, tmp_path, by):
    folder = folders.copy(tmp_path)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:by] if by < 0 else data + b"\0" * by)
    with pytest.raises(ModelError, match=r"model.safetensors: "):
        build(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
def test_non_finite_weights_are_named_on_load(folders, tmp_path, dtype, value):
    folder = folders.copy(tmp_path)
    tensors = load_file(str(folder / "model.safetensors"))
    values = {name: tensor.astype(array_type(dtype)) for name, tensor in tensors.items()}
    values["llama.layers.1.mlp.up_proj.weight"][-1, -1] = value
    values["llama.norm.weight"][0] = 6e4 if dtype == "float16" else 3e38  # large, and a number
    save_file(values, str(folder / "model.safetensors"), {"format": "np"})
    if value == 0:
        assert build(folder) is not None
    else:
        with pytest.raises(ModelError, match=r"llama.layers.1.mlp.up_proj.weight holds values that are not finite"):
            build(folder)


def test_non_finite_values_are_found_in_any_layout():
    values = np.zeros((700, 800), np.float32)
    assert all_finite(values) and all_finite(values.T) and all_finite(values[::2, ::3]) and all_finite(np.zeros(0))
    values[-1, 0] = np.nan
    assert not all_finite(values) and not all_finite(values.T) and all_finite(values[:-1])
    assert all_finite(np.full(10, 3e38, np.float32)) and all_finite(np.arange(5)) and all_finite(np.float32(1)[None])


def test_a_sparse_terabyte_file_is_refused_at_once(folders, tmp_path):
    folder = folders.copy(tmp_path, num_hidden_layers=1, vocab_size=2**26, hidden_size=2**12)
    entry = {"dtype": "F32", "shape": [2**26, 2**12], "data_offsets": [0, 2**40]}
    text = json.dumps({"llama.layers.0.mlp.down_proj.weight": {**entry, "shape": [0], "data_offsets": [0, 0]},
                       _EMBEDDING: entry}).encode()  # fmt: skip
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2**40)
    start = time.thread_time()
    with pytest.raises(ModelError, match=r"of memory, and .* are"):
        build(folder)
    assert time.thread_time() - start < 2


def test_pipes_and_folders_in_place_of_files_are_refused(folders, tmp_path):
    import os

    folder = folders.copy(tmp_path)
    for name in ("config.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(ModelError, match=f"{name}: a pipe, not a regular file|{name}: .*pipe"):
            read_config(folder) if name == "config.json" else read_generation_config(folder)
        (folder / name).unlink()
        folders.copy(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        WeightFolder.open(folder)
