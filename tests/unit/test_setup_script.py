"""scripts/setup.sh picks the Paddle wheel that the machine's driver can run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from helpers import ROOT


def choose(tmp_path: Path, smi: str | None, **environment: str) -> subprocess.CompletedProcess[str]:
    """choose_paddle with an nvidia-smi that prints `smi` (None: there is none)."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    if smi is not None:
        program = binaries / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{smi}'\n")
        program.chmod(0o755)
    path = f"{binaries}:/usr/bin:/bin" if smi is not None else "/usr/bin:/bin"
    return subprocess.run(
        ["bash", "-c", f"source {ROOT}/scripts/setup.sh; choose_paddle"],
        capture_output=True, text=True, check=False,
        env={"PATH": path, "HOME": os.environ.get("HOME", "/"), **environment},
    )  # fmt: skip


LINE = "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: {} |"


@pytest.mark.parametrize(
    ("cuda", "wheel"),
    [
        ("13.0", "cu130"),
        ("13.2", "cu130"),
        ("12.9", "cu129"),
        ("12.8", "cu126"),
        ("12.6", "cu126"),
        ("12.4", "cu118"),
        ("11.8", "cu118"),
    ],
)
def test_the_newest_wheel_the_driver_runs(tmp_path, cuda, wheel):
    result = choose(tmp_path, LINE.format(cuda))
    assert result.stdout.strip() == wheel, result.stderr


def test_without_a_driver_it_is_the_cpu(tmp_path):
    assert choose(tmp_path, None).stdout.strip() == "cpu"
    (tmp_path / "bin").rmdir()
    assert choose(tmp_path, "NVIDIA-SMI has failed").stdout.strip() == "cpu"


def test_the_users_word_goes_first(tmp_path):
    assert choose(tmp_path, LINE.format("12.6"), PADDLE="cu118").stdout.strip() == "cu118"


def test_an_old_driver_is_told_so(tmp_path):
    result = choose(tmp_path, LINE.format("11.2"))
    assert result.returncode == 1 and "needs 11.8 or newer" in result.stderr
