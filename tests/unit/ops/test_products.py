"""Which library multiplies matrices on a CPU: chosen by processor, the same on all ranks, and kept by a resumed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import LLM, write_checkpoint
from oarlock.environment import matmul_library
from oarlock.errors import EnvironmentProblem

needs_library = pytest.mark.skipif(
    not matmul_library.LIBRARY.exists(), reason=f"{matmul_library.LIBRARY.name} is not built"
)


def run(code: str, **environment: str) -> str:
    """Run code in a separate process: Paddle chooses its library once."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": f"{LLM}:{LLM.parent}/tests", **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize(
    ("maker", "asked", "library"),
    [
        ("GenuineIntel", "", matmul_library.MKL),
        ("AuthenticAMD", "", matmul_library.ONEDNN),
        ("HygonGenuine", "", matmul_library.ONEDNN),
        ("", "", matmul_library.MKL),  # not an x86, or no Linux
        ("GenuineIntel", "onednn", matmul_library.ONEDNN),
        ("AuthenticAMD", "MKL", matmul_library.MKL),
    ],
)
def test_the_processor_decides_the_library(monkeypatch, maker, asked, library):
    monkeypatch.setattr(matmul_library, "read_processor_vendor", lambda: maker)
    monkeypatch.setenv(matmul_library.VARIABLE, asked)
    assert matmul_library.choose_library() == library


def test_an_unknown_library_is_refused(monkeypatch):
    monkeypatch.setenv(matmul_library.VARIABLE, "openblas")
    with pytest.raises(EnvironmentProblem, match="OARLOCK_GEMM=openblas: must be mkl or onednn"):
        matmul_library.choose_library()


# The effect of the processor's vendor: which libraries are loaded, and which one computes Paddle's own products and
# those of the fused operators.
_DISPATCH = """
import ctypes, json, os, sys
from pathlib import Path
from types import SimpleNamespace
from oarlock.environment import matmul_library
matmul_library.read_processor_vendor = lambda: sys.argv[1] if len(sys.argv) > 1 else MAKER
from oarlock.environment.paddle_import import import_paddle
import_paddle(2)
import paddle
from oarlock.ops import decoder_layer, library

def asked():
    return matmul_library._gemm.oarlock_num_products() if matmul_library._gemm else 0

found, x = {}, paddle.ones([16, 16])
before = asked(); paddle.matmul(x, x); found["2-D"] = asked() - before
before = asked(); paddle.matmul(paddle.ones([4, 8, 8]), paddle.ones([4, 8, 8])); found["batched"] = asked() - before
before = asked(); decoder_layer.fused_layer_start(x, x[0], x, x, x, 1e-6); found["fused"] = asked() - before
maps = Path("/proc/self/maps").read_text()
found |= {"in use": matmul_library.find_library_in_use(), "in memory": "oarlock_gemm.so" in maps}
print(json.dumps(found))
"""


@needs_library
@pytest.mark.parametrize(
    ("maker", "environment", "expected"),
    [
        # The library that preempts MKL is not even loaded: Paddle's own products are unchanged.
        ("GenuineIntel", {}, {"2-D": 0, "batched": 0, "fused": 0, "in use": "mkl", "in memory": False}),
        ("AuthenticAMD", {}, {"2-D": 1, "batched": 1, "fused": 3, "in use": "onednn", "in memory": True}),
        ("AuthenticAMD", {"OARLOCK_GEMM": "mkl"}, {"2-D": 0, "fused": 0, "in use": "mkl", "in memory": False}),
    ],
)
def test_which_library_multiplies(maker, environment, expected):
    found = json.loads(run(_DISPATCH.replace("MAKER", repr(maker)), **{"OARLOCK_GEMM": "", **environment}))
    assert {name: found[name] for name in expected} == expected


_VALUES = """
import numpy as np
from oarlock.environment import matmul_library
from oarlock.environment.paddle_import import import_paddle
import_paddle(2)
import paddle

def compare():
    rng = np.random.default_rng(0)
    for a, b in [((1, 7), (7, 1)), ((3, 1), (1, 5)), ((70, 33), (33, 129)), ((300, 257), (257, 640)),
                 ((5, 1, 40), (5, 40, 64)), ((2, 3, 17, 64), (2, 3, 64, 17)), ((64, 2, 2), (2, 2)), ((0, 4), (4, 3))]:
        x, y = (rng.standard_normal(shape, np.float32) for shape in (a, b))
        for turn_x in (False, True):
            for turn_y in (False, True):
                given = [np.ascontiguousarray(np.swapaxes(m, -1, -2)) if turn else m
                         for m, turn in ((x, turn_x), (y, turn_y))]
                made = [paddle.matmul(*map(paddle.to_tensor, given), turn_x, turn_y).numpy() for _ in range(3)]
                exact = x.astype(np.float64) @ y
                assert made[0].shape == exact.shape
                np.testing.assert_allclose(made[0], exact, rtol=1e-4, atol=1e-4)
                assert all(np.array_equal(made[0], again) for again in made), (a, b)

for library in ("onednn", "mkl", "onednn"):
    assert matmul_library.use_library(library) == "" and matmul_library.find_library_in_use() == library
    compare()
"""


@needs_library
@pytest.mark.parametrize("threads", ["1", "2"])
def test_products_are_correct_and_deterministic(threads):
    run(_VALUES.replace("import_paddle(2)", f"import_paddle({threads})"), OARLOCK_GEMM="onednn")


_IMPORTED_BEFORE = """
import ctypes
from pathlib import Path
import paddle
from oarlock.environment import matmul_library

core = ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libphi_core.so"))
print(matmul_library.use_library("onednn") or matmul_library.find_library_in_use(), core.omp_get_max_threads())
"""


@needs_library
@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_program_that_imported_paddle_itself_gets_the_library_and_keeps_its_threads(threads):
    assert run(_IMPORTED_BEFORE, OMP_NUM_THREADS=threads).split() == ["onednn", threads]


_MULTIPLIED_BEFORE = """
import paddle
ones = paddle.ones(SHAPE)
paddle.matmul(ones, ones)
from oarlock.environment import matmul_library
from oarlock.train.setup import choose_matmul_library

choose_matmul_library(None)
print(matmul_library.find_library_in_use(), matmul_library._gemm.oarlock_multiplies_by_mkl())
"""


@needs_library
@pytest.mark.parametrize("shape", [[2, 2], [4, 8, 8]], ids=["2-D", "batched"])
def test_after_a_product_of_paddles_all_products_are_mkls(shape):
    """Where the fused operators kept oneDNN, a run resumed from the checkpoint, which names MKL, had other bits."""
    *_, said, found = run(_MULTIPLIED_BEFORE.replace("SHAPE", str(shape)), OARLOCK_GEMM="onednn").splitlines()
    assert found == "mkl 1"
    assert "oneDNN is not available for matrix multiplication: Paddle has multiplied before in this process" in said


def test_a_library_that_is_not_built_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(matmul_library, "LIBRARY", tmp_path / "oarlock_gemm.so")
    monkeypatch.setattr(matmul_library, "_gemm", None)
    assert "is not built (`bash scripts/setup.sh`" in matmul_library.use_library(matmul_library.ONEDNN)
    (tmp_path / "oarlock_gemm.so").write_bytes(b"not a library")
    assert "can't be loaded with this Paddle" in matmul_library.use_library(matmul_library.ONEDNN)
    assert matmul_library.use_library(matmul_library.MKL) == ""


@pytest.fixture
def libraries(monkeypatch):
    """setup.choose_matmul_library with stub libraries; returns the one in use and the default of this processor."""
    state = {"used": matmul_library.MKL, "best": matmul_library.ONEDNN, "asked": "", "problem": ""}

    def use(library):
        if not state["problem"]:
            state["used"] = library
        return state["problem"]

    monkeypatch.setattr(matmul_library, "use_library", use)
    monkeypatch.setattr(matmul_library, "choose_library", lambda: state["asked"] or state["best"])
    monkeypatch.setattr(matmul_library, "read_requested_library", lambda: state["asked"])
    monkeypatch.setattr(matmul_library, "find_library_in_use", lambda: state["used"])
    monkeypatch.setattr("oarlock.environment.console._logged", set())
    return state


@pytest.mark.parametrize(
    ("recorded", "state", "used", "said"),
    [
        (None, {}, "onednn", ""),
        ("onednn", {}, "onednn", ""),
        ("mkl", {"best": "mkl"}, "mkl", ""),
        ("mkl", {}, "mkl", "by MKL, as in the checkpoint; a new run would use oneDNN"),
        ("onednn", {"best": "mkl"}, "onednn", "by oneDNN, as in the checkpoint; a new run would use MKL"),
        (
            "mkl",
            {"asked": "onednn"},
            "onednn",
            "with MKL, this run multiplies with oneDNN: results may differ in the last bits",
        ),
        (
            "onednn",
            {"best": "mkl", "problem": "no library"},
            "mkl",
            "is not available for matrix multiplication: no library",
        ),
        ("", {}, "onednn", "does not name its matrix multiplication library, this run uses oneDNN"),
        ("", {"best": "mkl"}, "mkl", ""),
        ("blis", {}, "onednn", "with blis, this run multiplies with oneDNN: results may differ in the last bits"),
    ],
)
def test_a_resumed_run_keeps_its_library_or_reports_the_change(libraries, capsys, recorded, state, used, said):
    from oarlock.train.setup import choose_matmul_library

    libraries |= state
    choose_matmul_library(recorded)
    assert libraries["used"] == used
    heard = capsys.readouterr().out
    assert said in heard if said else not heard


def test_the_library_is_read_from_the_resumed_checkpoint(tmp_path):
    from oarlock.train.checkpoint.resume import read_recorded_matmul_library

    checkpoint = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None, overwrite_output_dir=False)
    config = SimpleNamespace(checkpoint=checkpoint, evaluation=SimpleNamespace(do_train=True))
    assert read_recorded_matmul_library(config) is None
    for step, library in ((2, "mkl"), (10, "onednn")):
        _write_checkpoint(tmp_path / f"checkpoint-{step}", step, library)
    assert read_recorded_matmul_library(config) == "onednn"
    (tmp_path / "checkpoint-10" / "manifest.json").write_text("{")  # damaged: the previous one will be used
    assert read_recorded_matmul_library(config) == "mkl"
    checkpoint.resume_from_checkpoint = str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-10" / "manifest.json").unlink()
    assert read_recorded_matmul_library(config) == "mkl"
    checkpoint.overwrite_output_dir = True
    assert read_recorded_matmul_library(config) is None


def _write_checkpoint(folder: Path, step: int, library: str) -> None:
    write_checkpoint(folder, step, products=library)
