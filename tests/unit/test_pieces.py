"""Tensors stored in pieces are read back to the last bit under any other layout, and nothing missing is made up."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import tempfile
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from oarlock.errors import CheckpointError
from oarlock.models.layout import Block
from oarlock.models.pieces import INDEX, WEIGHTS, Piece, PieceFolder, part_name, write_index
from oarlock.models.safetensors_stream import TensorSource, write_safetensors

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32")
quick = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


def dtype_of(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """To the last bit: NaN and -0.0 too."""
    return (found.dtype, found.shape) == (expected.dtype, expected.shape) and found.tobytes() == expected.tobytes()


def source(name: str, array: np.ndarray) -> TensorSource:
    return TensorSource(name, array.dtype.name, array.shape, lambda: array)


# What is drawn.


@st.composite
def tensors(draw, dtypes=DTYPES) -> np.ndarray:
    """Any bits, one to three axes."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    dtype = dtype_of(draw(st.sampled_from(dtypes)))
    random = np.random.RandomState(draw(st.integers(0, 2**16)))
    return np.frombuffer(random.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


@st.composite
def blocks(draw, shape: tuple[int, ...], axis: int | None = None) -> list[Block]:
    """The parts of tensor-parallel ranks: an axis in runs, dealt out in any order (fused projections have several)."""
    if draw(st.integers(0, 4)) == 0:
        return [Block(shape)]
    axis = draw(st.integers(0, len(shape) - 1)) if axis is None else axis
    length = shape[axis]
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=7))) if length > 1 else []
    bounds = [0, *cuts, length]
    runs = draw(st.permutations([(a, b - a) for a, b in pairwise(bounds)]))
    degree = draw(st.integers(1, len(runs)))
    return [Block(shape, axis, tuple(runs[i::degree])) for i in range(degree)]


@st.composite
def slices(draw, block: Block) -> list[tuple[int, int] | None]:
    """All of a block, or what stage 3 leaves on each rank: equal lengths, the last ones cut at the end of the data."""
    size, ranks = math.prod(block.part_shape), draw(st.integers(0, 4))
    if not ranks:
        return [None]
    length = -(-size // ranks) + draw(st.integers(0, 3))
    found = [(min(i * length, size), min((i + 1) * length, size)) for i in range(ranks)]
    return [(start, stop) for start, stop in found if start < stop]


@st.composite
def layouts(draw, shape: tuple[int, ...], axis: int | None = None) -> list[tuple[Block, tuple[int, int] | None]]:
    """Every part of one tensor once."""
    return [(block, flat) for block in draw(blocks(shape, axis)) for flat in draw(slices(block))]


def cut(whole: np.ndarray, block: Block, flat: tuple[int, int] | None) -> np.ndarray:
    part = np.ascontiguousarray(block.cut(whole))
    return part if flat is None else part.reshape(-1)[flat[0] : flat[1]]


def store(folder: Path, whole: np.ndarray, layout, left_out: int | None = None) -> None:
    """One tensor as a checkpoint's ranks would write it, a part each."""
    parts: dict[str, list[Piece]] = {}
    for rank, part in enumerate(layout):
        pieces = [Piece(WEIGHTS, "w", *part)] if rank != left_out else []
        write_safetensors(folder / part_name(rank), [source(piece.key, cut(whole, *part)) for piece in pieces], {})
        parts[part_name(rank)] = pieces
    write_index(folder, parts)


# Blocks and pieces.


@quick
@given(st.data())
def test_a_piece_in_json_and_back(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    for block, flat in data.draw(layouts(shape)):
        piece = Piece(data.draw(st.sampled_from([WEIGHTS, "moment1", "master"])), "a.b/c.weight", block, flat)
        assert Piece.from_json(piece.key, json.loads(json.dumps(piece.to_json()))) == piece


@quick
@given(st.data())
def test_parts_put_together_are_the_whole(data):
    whole = data.draw(tensors())
    again = np.zeros_like(whole)
    for block in data.draw(blocks(whole.shape)):
        part = block.cut(whole)
        assert part.shape == block.part_shape
        block.put(part, again)
    assert same(again, whole)


# Reading.


@quick
@given(st.data())
def test_any_layout_reads_what_any_other_wrote(data):
    whole = data.draw(tensors())
    written = data.draw(layouts(whole.shape))
    wanted = data.draw(layouts(whole.shape))
    with tempfile.TemporaryDirectory() as name:
        store(Path(name), whole, written)
        with PieceFolder.open(name) as folder:
            assert (folder.kinds, list(folder.names())) == ([WEIGHTS], ["w"])
            assert folder.shape(WEIGHTS, "w") == whole.shape and folder.dtype(WEIGHTS, "w") == whole.dtype.name
            assert same(folder.read("w"), whole)
            for part in (*wanted, *written):
                assert same(folder.read_part(WEIGHTS, "w", *part), cut(whole, *part)), part


@quick
@given(st.data())
def test_what_is_missing_is_never_made_up(data):
    whole = data.draw(tensors())
    written = data.draw(layouts(whole.shape))
    gone = data.draw(st.integers(0, len(written) - 1))
    touched = np.zeros(whole.shape, bool)
    for i, (block, flat) in enumerate(written):
        part = np.zeros(block.part_shape, bool)
        part.reshape(-1)[slice(None) if flat is None else slice(*flat)] = True
        if i == gone:
            block.put(part, touched)
    with tempfile.TemporaryDirectory() as name:
        store(Path(name), whole, written, left_out=gone)
        with PieceFolder.open(name) as folder:
            with pytest.raises(CheckpointError, match="w is"):
                folder.read("w")
            for part in data.draw(layouts(whole.shape)):
                if cut(touched, *part).any():
                    with pytest.raises(CheckpointError, match="w is"):
                        folder.read_part(WEIGHTS, "w", *part)
                else:  # it may be refused, but must not be wrong
                    with suppress(CheckpointError):
                        assert same(folder.read_part(WEIGHTS, "w", *part), cut(whole, *part))


def test_large_tensors_are_read_in_chunks(tmp_path, monkeypatch):
    """Chunks of the smallest size give the same as one that holds all."""
    whole = np.arange(7 * 6 * 5, dtype=np.float32).reshape(7, 6, 5)
    written = [(Block(whole.shape, 1, ((4, 2), (0, 1))), None), (Block(whole.shape, 1, ((1, 3),)), None)]
    store(tmp_path, whole, written)
    for size in (1, 4, 50, 61, 130, 1 << 20):
        monkeypatch.setattr("oarlock.models.pieces._CHUNK", size)
        with PieceFolder.open(tmp_path) as folder:
            assert same(folder.read("w"), whole)


def test_errors_name_file_and_tensor(tmp_path):
    whole = np.arange(64, dtype=np.float32).reshape(8, 8)
    layout = [(Block(whole.shape, 0, ((0, 4),)), None), (Block(whole.shape, 0, ((4, 4),)), None)]
    store(tmp_path, whole, layout)
    second = tmp_path / part_name(1)
    content = second.read_bytes()

    def message(**arguments) -> str:
        with PieceFolder.open(tmp_path) as folder, pytest.raises(CheckpointError) as caught:
            folder.read(**{"name": "w", **arguments})
        return str(caught.value)

    assert "no model of other" in message(name="other")
    assert "no moment1 of w" in message(kind="moment1")
    second.write_bytes(content[:-4])
    assert part_name(1) in message()
    second.write_bytes(b"")
    assert part_name(1) in message()
    second.unlink()
    assert part_name(1) in message()
    second.write_bytes(content)
    with (
        PieceFolder.open(tmp_path) as folder,
        pytest.raises(CheckpointError, match=r"\[8, 8\], the model's is \[4, 8\]"),
    ):
        folder.read_part(WEIGHTS, "w", Block((4, 8)))
    for text in ("", "[]", '{"rank": 1}', '{"rank": {"model/w": {}}}', "{"):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=INDEX):
            PieceFolder.open(tmp_path)


def test_a_piece_that_is_not_what_the_index_says(tmp_path):
    whole = np.arange(64, dtype=np.float32).reshape(8, 8)
    halves = [Block(whole.shape, 0, ((0, 4),)), Block(whole.shape, 0, ((4, 4),))]
    for other in (whole[4:].astype(np.float64), whole[5:]):
        for i, array in enumerate((whole[:4], other)):
            write_safetensors(tmp_path / part_name(i), [source("model/w", array)], {})
        write_index(tmp_path, {part_name(i): [Piece(WEIGHTS, "w", block)] for i, block in enumerate(halves)})
        with PieceFolder.open(tmp_path) as folder, pytest.raises(CheckpointError, match=part_name(1)):
            folder.read("w")


def test_memory_is_one_tensor_and_a_little(tmp_path):
    """Eight tensors of 20 MB in two kinds of pieces: writing them whole takes one tensor and a chunk."""
    shape = (1024, 4882)
    parts: dict[str, list[Piece]] = {}
    for rank in range(2):
        half = np.full(shape[0] * shape[1] // 2, rank, np.float32)
        stage3 = [Piece(WEIGHTS, f"a{i}", Block(shape), (rank * half.size, (rank + 1) * half.size)) for i in range(4)]
        tensor = [Piece(WEIGHTS, f"b{i}", Block(shape, 1, ((rank * 2441, 2441),))) for i in range(4)]
        arrays = [source(piece.key, half) for piece in stage3]
        arrays += [source(piece.key, half.reshape(tensor[0].block.part_shape)) for piece in tensor]
        write_safetensors(tmp_path / part_name(rank), arrays, {})
        parts[part_name(rank)] = [*stage3, *tensor]
    write_index(tmp_path, parts)
    context = multiprocessing.get_context("fork")  # a forked process begins with a peak of what it has
    grown = context.Queue()
    process = context.Process(target=_memory_of_writing, args=(tmp_path, grown))
    process.start()
    assert grown.get(timeout=60) < 20 + 16 + 8
    process.join()


def _memory_of_writing(path: Path, grown) -> None:
    before = _peak_mb()
    with PieceFolder.open(path) as folder:
        whole = [
            TensorSource(name, "float32", folder.shape(WEIGHTS, name), partial(folder.read, name))
            for name in folder.names()
        ]
        write_safetensors(path / "whole.safetensors", whole, {})
    grown.put(_peak_mb() - before)


def _peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


# Writing.


@quick
@given(st.lists(tensors((*DTYPES, "int16", "int8", "uint8", "bool")), max_size=6), st.booleans())
def test_the_library_reads_what_is_written(arrays, odd_shapes):
    if odd_shapes:
        arrays = [*arrays, np.zeros([0, 3], np.float32), np.array(1.5), np.asfortranarray(np.arange(6.0).reshape(2, 3))]
    arrays = [array.astype(bool) if array.dtype == bool else array for array in arrays]
    named = {f"t{i}": array for i, array in enumerate(arrays)}
    progress: list[int] = []
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.safetensors"
        record = write_safetensors(path, [source(*item) for item in named.items()], {"format": "np"}, progress.append)
        content = path.read_bytes()
        assert (record.num_bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        with safe_open(path, framework="np") as file:
            assert set(file.keys()) == set(named) and file.metadata() == {"format": "np"}
            for key, array in named.items():
                assert same(file.get_tensor(key), np.asarray(array, order="C")), key
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for key, array in named.items():
        assert header[key]["data_offsets"][0] % array.itemsize == 0
    assert sum(progress) == sum(array.nbytes for array in named.values())


def test_bfloat16_as_bits(tmp_path):
    """What a Paddle tensor's numpy() gives."""
    values = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16)
    tensor = TensorSource("w", "bfloat16", (2, 3), lambda: values.view(np.uint16).reshape(2, 3))
    write_safetensors(tmp_path / "a.safetensors", [tensor], {})
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert same(file.get_tensor("w"), values.reshape(2, 3))


@pytest.mark.parametrize("values", [np.zeros(5, np.float32), np.zeros([3, 2], np.float32), np.zeros([2, 3], np.int32)])
def test_values_that_are_not_what_was_said(tmp_path, values):
    with pytest.raises(ValueError, match="w has"):
        write_safetensors(tmp_path / "a", [TensorSource("w", "float32", (2, 3), lambda: values)], {})
