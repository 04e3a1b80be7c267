"""Headers of safetensors files: accepted tensors are inside the file, and the safetensors library accepts them too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from harness import Harness
from safetensors import deserialize
from safetensors.numpy import save

from oarlock.formats.safetensors_header import read_header
from oarlock.weights.safetensors_file import SafetensorsFile


def target(data: bytes, folder: Path) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(data)
    header = read_header(path)
    assert all(0 <= entry.start <= entry.end <= len(data) for entry in header.tensors.values())
    theirs = dict(deserialize(data))
    assert {name: list(entry.shape) for name, entry in header.tensors.items()} == {
        name: entry["shape"] for name, entry in theirs.items()
    }
    with SafetensorsFile(path) as file:  # as in loading weights
        for name, about in file.tensors.items():
            values = np.empty(about.shape, about.dtype)
            file.read(name, 0, values)
            assert values.tobytes() == bytes(theirs[name]["data"])


def seeds() -> list[bytes]:
    files = [
        {"a": np.zeros((2, 3), "f4"), "b": np.arange(5, dtype="i8"), "empty": np.zeros((0, 2), "f2")},
        {"model.layers.0.weight": np.ones((4, 4), "u1"), "scalar": np.ones((), "f8")},
        {},
    ]
    return [save(tensors, meta) for tensors in files for meta in (None, {"format": "np"})]


HARNESS = Harness(
    target,
    seeds,
    tokens=[
        b'"dtype":"F4"',
        b'"dtype":"F64"',
        b'"shape":[',
        b'"data_offsets":[0,0]',
        b"18446744073709551616",
        b"-1",
        b"[]",
        b'"__metadata__":{',
        b"1e3",
        b"null",
        b"281474976710656",
        b"\x08\x00\x00\x00\x00\x00\x00\x00",
        b"\xff" * 8,
    ],
)
