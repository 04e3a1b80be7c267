"""The wheel holds the whole package, and trains outside the repository with recipes by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers import ROOT, read_rows

SOURCES = ("llm", "configs", "custom_ops", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
SHORT = ("--max_steps", "2", "--warmup_steps", "1", "--gradient_accumulation_steps", "1", "--logging_steps", "1")


def run(words: list[str | Path], **settings: object) -> str:
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=600, check=False, **settings)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, folder)
    pip = [sys.executable, "-m", "pip", "wheel", folder, "--no-deps", "--no-build-isolation", "-w", folder / "dist"]
    run(pip, cwd=folder, env={**os.environ, "OARLOCK_OPS": "0", "PIP_NO_INDEX": "1"})
    (found,) = (folder / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder that the wheel was installed into."""
    site = tmp_path_factory.mktemp("site")
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel])
    return site


def test_the_wheel_contains_every_module_recipe_and_script(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT / "llm").as_posix() for path in (ROOT / "llm" / "oarlock").rglob("*.py")}
    configs = {f"oarlock/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*") if path.is_file()}
    scripts = {f"oarlock/entrypoints/{name}" for name in ("run_pretrain.py", "finetune_generation.py")}
    assert sorted((modules | configs | scripts) - held) == []


def test_the_wheel_trains_outside_the_repository(installed, tiny_model, tmp_path):
    """Both with the console script on two ranks of Paddle's launcher, and with the packaged script of `oarlock launch`."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    oarlock, recipe = installed / "bin" / "oarlock", ("finetune", "lora_7b", "--model_name_or_path", tiny_model, *SHORT)
    launcher = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", "log"]
    cpu = environment | {"PADDLE_DISTRI_BACKEND": "gloo"}
    run([*launcher, oarlock, *recipe, "--output_dir", "two"], cwd=tmp_path, env=cpu)
    run([oarlock, "launch", "--device", "cpu", *recipe, "--output_dir", "one"], cwd=tmp_path, env=environment)
    for name in ("one", "two"):
        assert [row["step"] for row in read_rows(tmp_path / name / "metrics.jsonl") if "loss" in row] == [1, 2]
        assert (tmp_path / name / "adapter.json").is_file()
