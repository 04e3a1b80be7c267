"""Copies between float dtypes, transposed or not, compared with NumPy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.ops import copy_matrix
from oarlock.weights.buffers import copy_array, populate

TYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def check(rows: int, columns: int, source: np.dtype, target: np.dtype, turned: bool, seed: int) -> None:
    """Slices of larger arrays, all bit patterns except NaNs of another dtype; nothing outside the slice is written."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, (columns + 3, rows + 5), np.uint64)
    whole = bits.astype(f"uint{8 * source.itemsize}").view(source)
    if source != target:
        whole[np.isnan(whole.astype(np.float32))] = 1
    values = whole[2 : 2 + columns, 1 : 1 + rows]
    values = values.T if turned else np.ascontiguousarray(values.T)
    around = np.full((rows + 2, columns + 7), 7, target)
    to = around[1:-1, 3:-4]
    assert copy_matrix.copy_matrix(to, values)
    word = f"uint{8 * target.itemsize}"
    with np.errstate(all="ignore"):
        wanted = values.astype(target)
    assert np.array_equal(np.ascontiguousarray(to).view(word), np.ascontiguousarray(wanted).view(word))
    to[:] = 7
    assert np.all(around == np.array(7, target))


@settings(deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(TYPES),
    st.sampled_from(TYPES),
    st.booleans(),
    st.integers(0, 9),
)
def test_any_matrix(rows, columns, source, target, turned, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy_matrix, "_MIN_SIZE", 0)
        if rows > 1 and columns > 1:  # a single row or column is contiguous both ways
            check(rows, columns, source, target, turned, seed)


@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_lower_instruction_sets(isa):
    code = (
        "import itertools, test_matrix_copies as t\n"
        "for source, target, turned in itertools.product(t.TYPES, t.TYPES, (False, True)):\n"
        "    t.check(147, 93, source, target, turned, 3)\n"
    )
    folder = Path(__file__).resolve().parent
    path = f"{folder}:{folder.parents[2] / 'llm'}"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OARLOCK_ISA": isa, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("built", [True, False])
def test_copies_that_the_library_does_not_support_are_correct(built, monkeypatch):
    if not built:
        monkeypatch.setattr(copy_matrix, "_function", lambda: None)
    values = np.arange(3 * 200 * 100, dtype=np.float32).reshape(3, 200, 100)
    for source in (
        values,
        values.transpose(2, 1, 0),
        values[:, ::-1],
        values[0].T,
        np.broadcast_to(values[0, 0], (90, 100)),
    ):
        for target in (np.float32, np.float64, ml_dtypes.bfloat16):
            to = np.zeros(source.shape, target)
            copy_array(to, source)
            assert np.array_equal(to, source.astype(target))


def test_populated_pages_keep_their_content():
    memory = np.arange(3 << 20, dtype=np.uint8)
    populate(memory[5:-7])
    assert np.array_equal(memory, np.arange(3 << 20, dtype=np.uint8))
    populate(memory[:0])
