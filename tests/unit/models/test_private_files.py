"""File modes: outputs of private files are private, and a folder is private while it is written."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from helpers import make_adapter
from oarlock import files
from oarlock.export.convert import ConvertOptions, convert
from oarlock.export.export import export
from oarlock.export.request import ExportRequest
from oarlock.export.triton import export_triton
from oarlock.files import create_folder
from oarlock.merge.inputs import AdapterMix
from oarlock.merge.merge import MergeOptions, merge
from oarlock.weights.folder_files import find_readers


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def read_modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def plain_umask(monkeypatch):
    monkeypatch.setattr(files, "_umask", 0o022)
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("plain_umask")
def test_outputs_of_private_files_are_private(model, tmp_path, capsys):
    adapter = make_adapter(model, tmp_path / "adapter")
    for path in model.iterdir():
        path.chmod(0o644)
    options = {"proof": False}

    def make(name: str) -> list[Path]:
        place = tmp_path / name
        convert(model, place / "hf", "hf", ConvertOptions(**options))
        merge(model, AdapterMix.open([adapter]), place / "merged", MergeOptions(**options))
        export(ExportRequest("vllm", str(model), place / "vllm", proof=False))
        export_triton(model, {}, place / "triton")
        return list(place.iterdir())

    for folder in make("open"):
        assert read_modes(folder) <= {0o644, 0o755} and stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert "mode 600" not in capsys.readouterr().out
    (model / "model.safetensors").chmod(0o600)
    made = make("private")
    assert len(made) == 4
    for folder in made:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for path in (path for path in folder.rglob("*") if path.is_file()):
            linked = path.stat().st_nlink > 1  # the source's own file: its mode stays
            assert stat.S_IMODE(path.stat().st_mode) in ((0o600, 0o644) if linked else (0o600, 0o700)), path
    weights = tmp_path / "private/triton/oarlock/1/model/model.safetensors"
    assert weights.samefile(model / "model.safetensors")
    assert "model.safetensors has mode 600" in capsys.readouterr().out
    assert find_readers(model) == 0o600 and stat.S_IMODE((model / "config.json").stat().st_mode) == 0o644


@pytest.mark.usefixtures("plain_umask")
def test_a_folder_is_private_while_it_is_written(tmp_path):
    with create_folder(tmp_path / "out") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "a").write_text("x")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755 and read_modes(tmp_path / "out") == {0o644}
