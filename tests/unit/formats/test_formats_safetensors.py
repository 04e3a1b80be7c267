"""Headers of safetensors files are read as by the safetensors library; invalid ones are refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from oarlock.errors import CheckpointError, ModelError
from oarlock.formats.safetensors_header import DTYPES, TensorEntry, parse_header, read_header


def file_of(entries: object, data: int) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def header_of(content: bytes):
    length = int.from_bytes(content[:8], "little")
    return parse_header(content[8 : 8 + length], len(content) - 8 - length, "x.safetensors")


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_header_written_by_the_library_is_read(tmp_path):
    tensors = {"a": np.zeros((2, 3), "f4"), "empty": np.zeros((0, 3), "f2"), "b": np.ones((), "i8")}
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, {"format": "np"}))
    found = read_header(path)
    assert found.metadata == {"format": "np"}
    assert {name: (t.dtype, t.shape, t.end - t.start) for name, t in found.tensors.items()} == {
        "a": ("F32", (2, 3), 24),
        "empty": ("F16", (0, 3), 0),
        "b": ("I64", (), 8),
    }
    with open(path, "rb") as file:
        file.seek(5)
        assert read_header(file).tensors == found.tensors
        b = found.tensors["b"]
        file.seek(b.start)
        assert np.frombuffer(file.read(b.end - b.start), "i8")[0] == 1


@given(
    st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), max_size=5), st.data()
)
def test_the_reader_accepts_what_the_library_accepts(tensors, data):
    """Contiguous entries, some of them altered: both accept them or both refuse them."""
    entries, at = {}, 0
    for i, (dtype, shape) in enumerate(tensors):
        size = -(-int(np.prod(shape)) * DTYPES[dtype] // 8)
        bend = data.draw(st.sampled_from([0, 0, 0, 0, 0, 0, 0, 1, -1]))
        begin = max(0, at + data.draw(st.sampled_from([0, 0, 0, 0, 0, 0, 0, 1, -1])))
        entries[f"t{i}"] = entry(dtype, shape, (begin, max(0, at + size + bend)))
        at += size
    content = file_of(entries, at)
    try:
        deserialize(content)
        theirs = True
    except SafetensorError:
        theirs = False
    try:
        header_of(content)
        ours = True
    except ModelError:
        ours = False
    assert ours == theirs


@given(st.binary(max_size=200), st.integers(0, 40))
def test_any_bytes_are_read_or_refused(text, data):
    try:
        parse_header(text, data, "x.safetensors")
    except ModelError as error:
        assert str(error).startswith("x.safetensors")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a safetensors file, or a truncated one"),
        (b"\xff" * 8, "a truncated one"),
        (file_of(b"[]", 0), "its header is not a JSON object"),
        (file_of(b'{"a":{"dtype":"F32"', 0), "(header):1: not valid JSON"),
        (file_of(b'{"a":1,"a":2}', 0), "(header):1: field 'a' appears twice"),
        (file_of({"a": [1]}, 0), "tensor 'a': its header entry must have dtype, shape and data_offsets"),
        (file_of({"a": entry() | {"more": 1}}, 8), "and nothing else"),
        (file_of({"a": entry("F31")}, 8), "F31 is not a safetensors dtype"),
        (file_of({"a": entry(["F32"])}, 8), "is not a safetensors dtype"),
        (file_of({"a": entry(shape=[-2])}, 8), "its shape must be a list of at most 16 sizes; got [-2]"),
        (file_of({"a": entry(shape=[True, 2])}, 8), "its shape must be a list"),
        (file_of({"a": entry(shape=[1] * 17)}, 8), "its shape must be a list of at most 16"),
        (file_of({"a": entry(shape=[1 << 48] * 9 + [0], offsets=(0, 0))}, 0), None),
        (file_of({"a": entry(shape=[1 << 40] * 4)}, 8), "8 bytes, but F32 of shape"),
        (file_of({"a": entry(offsets=[0, 8, 8])}, 8), "its data_offsets must be [begin, end]"),
        (file_of({"a": entry(offsets=[0, 8.0])}, 8), "its data_offsets must be [begin, end]"),
        (file_of({"a": entry(offsets=[8, 0])}, 8), "its bytes 8 to 0 are outside the file, which has 8 bytes of data"),
        (file_of({"a": entry(offsets=[0, 16], shape=[4])}, 8), "bytes 0 to 16 are outside the file"),
        (file_of({"a": entry(shape=[3])}, 8), "8 bytes, but F32 of shape [3] takes 12"),
        (file_of({"a": entry(offsets=[4, 12])}, 12), "'a' leaves a gap after the header"),
        (file_of({"a": entry(), "b": entry(offsets=[4, 12])}, 12), "'b' overlaps tensor 'a'"),
        (file_of({"a": entry(), "b": entry(offsets=[12, 20])}, 20), "'b' leaves a gap after tensor 'a'"),
        (file_of({"a": entry()}, 9), "1 bytes after tensor 'a' belong to no tensor"),
        (file_of({"__metadata__": {"a": 1}}, 0), "__metadata__ of the header must be an object of strings"),
    ],
)
def test_refusals_name_the_field(content, reason, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    if reason is None:
        assert read_header(path).tensors["a"].end == read_header(path).tensors["a"].start
        return
    with pytest.raises(CheckpointError) as caught:
        read_header(path, error=CheckpointError)
    assert reason in str(caught.value)


def test_order_in_the_header_is_free():
    found = header_of(file_of({"b": entry(offsets=[8, 16]), "a": entry()}, 16))
    assert list(found.tensors) == ["b", "a"]
    assert found.tensors["a"] == TensorEntry("F32", (2,), found.tensors["b"].start - 8, found.tensors["b"].start)
