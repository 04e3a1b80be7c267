"""custom_ops/build.py reports what is missing, compiles nothing twice, and builds for one Paddle."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT
from oarlock.ops import library

SCRIPT = ROOT / "custom_ops" / "build.py"


def build(folder, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--into", str(folder)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_without_a_compiler(tmp_path):
    result = build(tmp_path, CXX="no-such-compiler")
    assert result.returncode == 3 and not any(tmp_path.iterdir())
    assert "the fused ops are not built: there is no no-such-compiler" in result.stdout
    assert "Training works without them" in result.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_unchanged_sources_are_not_recompiled(tmp_path):
    assert build(tmp_path).returncode == 0
    before = (tmp_path / "oarlock_ops.so").stat().st_mtime_ns
    again = build(tmp_path)
    assert again.returncode == 0 and "is up to date (CPU" in again.stdout
    assert (tmp_path / "oarlock_ops.so").stat().st_mtime_ns == before
    (tmp_path / "oarlock_ops.so").unlink()
    assert "compiling 0 of" in build(tmp_path).stdout and (tmp_path / "oarlock_ops.so").exists()


def test_the_build_matches_this_version():
    assert re.findall(r"^INTERFACE = (\d+)$", SCRIPT.read_text(), re.MULTILINE) == [str(library.INTERFACE)]
    assert library.why_missing() == ""


def test_a_library_for_another_paddle_or_device_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "oarlock_ops.so")
    assert library.why_missing().startswith("the fused ops are not built (`bash scripts/setup.sh`")
    (tmp_path / "oarlock_ops.so").touch()
    assert library.why_missing().startswith("the fused ops are not built")
    stamp = {"interface": library.INTERFACE, "paddle": library._paddle_version(), "cuda": "", "objects": []}
    (tmp_path / "oarlock_ops.stamp").write_text(json.dumps(stamp))
    assert library.why_missing() == ""
    assert library.why_missing(on_gpu=True).startswith("the fused ops were built for the CPU only")
    for damaged in ("{", json.dumps(stamp | {"paddle": 3}), "[]"):
        (tmp_path / "oarlock_ops.stamp").write_text(damaged)
        assert library.why_missing().startswith("the fused ops' build is damaged: ")
    (tmp_path / "oarlock_ops.stamp").write_text(json.dumps(stamp | {"interface": 1}))
    assert library.why_missing().startswith("the fused ops were built from the sources of another version")
    (tmp_path / "oarlock_ops.stamp").write_text(json.dumps(stamp | {"paddle": "3.2.0"}))
    assert library.why_missing().startswith("the fused ops were built for Paddle 3.2.0, this is 3.")
