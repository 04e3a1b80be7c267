"""For a Triton repository broken in one way, the checker finds exactly that fault."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from oarlock import errors
from oarlock.environment import console
from oarlock.export.checks.check import check_folder, guess_server

CONFIG = """\
name: "chat"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [ { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]
"""
MODEL = "class TritonPythonModel:\n    def execute(self, requests):\n        return None\n"


@pytest.fixture
def repository(tmp_path) -> Path:
    folder = tmp_path / "repository"
    weights = folder / "chat" / "1" / "model"
    weights.mkdir(parents=True)
    (folder / "chat" / "config.pbtxt").write_text(CONFIG)
    (folder / "chat" / "1" / "model.py").write_text(MODEL)
    save_file({"a": np.zeros(8, np.float32)}, weights / "model.safetensors", {"format": "np"})
    shutil.copytree(folder / "chat", folder / "chat_infer", ignore=lambda *_: ["model"])
    (folder / "chat_infer" / "config.pbtxt").write_text(CONFIG.replace('"chat"', '"chat_infer"'))
    (folder / "chat_infer" / "1" / "model.py").write_text("from relay import Model as TritonPythonModel\n")
    (folder / "requirements.txt").write_text("numpy\n")
    return folder


def test_a_valid_repository_has_no_findings(repository):
    assert guess_server(repository) == "triton" and check_folder(repository, "triton") == []


@pytest.mark.parametrize(
    ("old", "new", "kind", "says"),
    [
        ('name: "chat"', 'name: "other"', "pbtxt", "the same name"),
        ('backend: "python"', "", "pbtxt", "no backend"),
        ("max_batch_size: 0", "max_batch: 0", "pbtxt", "max_batch"),
        ("TYPE_STRING dims: [ 1 ]", "TYPE_TEXT dims: [ 1 ]", "pbtxt", "TYPE_TEXT"),
        ("data_type: TYPE_STRING dims: [ 1 ]", "dims: [ 1 ]", "pbtxt", "text_input"),
        ("dims: [ -1 ]", "", "pbtxt", "text_output"),
        ('output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]', "", "pbtxt", "there are none"),
        ("decoupled: true }", "decoupled: true", "pbtxt", ""),
        ("max_batch_size: 0", 'default_model_filename: "other.py"', "version", "missing, though"),
        ("max_batch_size: 0", 'default_model_filename: "../x.py"', "pbtxt", "another folder"),
        (
            "max_batch_size: 0",
            'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/x.tar.gz" } }',
            "pbtxt",
            "from elsewhere",
        ),
        ("max_batch_size: 0", 'model_repository_agents { agents { name: "x" } }', "pbtxt", "from elsewhere"),
        ("max_batch_size: 0", "input { " * 500, "pbtxt", "levels deep"),
        ("max_batch_size: 0", "#" * (1 << 18), "pbtxt", "too large"),
    ],
)
def test_broken_configurations_are_found(repository, old, new, kind, says):
    assert old in CONFIG
    (repository / "chat" / "config.pbtxt").write_text(CONFIG.replace(old, new))
    (finding,) = check_folder(repository, "triton")
    assert finding.kind == kind and says in finding.problem and finding.place.startswith("chat/")


def lose_version(folder: Path) -> None:
    (folder / "chat_infer" / "1").rename(folder / "chat_infer" / "0")


def lose_code(folder: Path) -> None:
    (folder / "chat" / "1" / "model.py").unlink()


def break_code(folder: Path) -> None:
    (folder / "chat" / "1" / "model.py").write_text(MODEL.replace(":", "", 1))


def lose_class(folder: Path) -> None:
    (folder / "chat" / "1" / "model.py").write_text(MODEL.replace("Triton", ""))


def cut_weights(folder: Path) -> None:
    path = folder / "chat" / "1" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lose_weights(folder: Path) -> None:
    shutil.rmtree(folder / "chat" / "1" / "model")


def lose_requirements(folder: Path) -> None:
    (folder / "requirements.txt").unlink()


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        (lose_version, "version"),
        (lose_code, "version"),
        (break_code, "code"),
        (lose_class, "code"),
        (cut_weights, "shard"),
        (lose_weights, "weights"),
        (lose_requirements, "requirements"),
    ],
)
def test_missing_and_unexpected_files_are_found(repository, way, kind):
    way(repository)
    assert [finding.kind for finding in check_folder(repository, "triton")] == [kind]


def test_without_tritonclient_the_rest_is_checked(repository, monkeypatch, capsys):
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("tritonclient"):
            raise ModuleNotFoundError(name)
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(console, "_logged", set())
    lose_requirements(repository)
    assert [finding.kind for finding in check_folder(repository, "triton")] == ["requirements"]
    assert capsys.readouterr().out.count("pip install 'oarlock[serve]'") == 1


def test_code_of_another_version_is_found(tiny_model, tmp_path):
    from oarlock.export.manifest import MANIFEST_FILE, write_manifest
    from oarlock.export.triton import export_triton

    folder = tmp_path / "out"
    export_triton(tiny_model, {}, folder)
    assert check_folder(folder, "triton", hashes=True) == []
    library = folder / "oarlock_infer/1/lib/oarlock"
    (library / "errors.py").write_text((library / "errors.py").read_text() + "import os\n")
    (finding,) = check_folder(folder, "triton")
    assert finding.kind == "code" and finding.place == "oarlock_infer/1/lib/oarlock/errors.py"
    write_manifest(folder, target="triton")  # it is in the code folder, so it proves nothing
    assert [finding.kind for finding in check_folder(folder, "triton", hashes=True)] == ["code"]
    shutil.copy(Path(errors.__file__), library / "errors.py")
    for name, content, kind in (
        ("oarlock/1/model.py", MODEL, "code"),
        ("oarlock/1/lib/paddle.py", "", "foreign"),  # shadows the package of that name
        ("oarlock/2/model.py", "import os", "foreign"),
        ("oarlock/1/model/modeling.py", "", "foreign"),
        ("start.sh", "", "foreign"),
        ("requirements.txt", "numpy==1.26\nnumpi==1.0\n", "requirements"),
        ("requirements.txt", "--extra-index-url http://example.invalid/\n", "requirements"),
        ("requirements.txt", "numpy @ http://example.invalid/numpy.whl\n", "requirements"),
    ):
        path = folder / name
        before = path.read_text() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        write_manifest(folder, target="triton")
        assert kind in [finding.kind for finding in check_folder(folder, "triton", hashes=True)], name
        path.unlink() if before is None else path.write_text(before)
    shutil.rmtree(folder / "oarlock/2")
    write_manifest(folder, target="triton")
    assert check_folder(folder, "triton", hashes=True) == []
    for name in ("oarlock/1/libtriton_python.so", "oarlock/1/lib/oarlock/__pycache__/errors.cpython-311.pyc", "x"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    found = check_folder(folder, "triton")
    assert {finding.kind for finding in found} == {"code", "foreign"}
    assert "libtriton_python.so" in found[0].place and "3 in all" not in found[0].place
    (folder / MANIFEST_FILE).write_text("{}")
    assert "manifest" in {finding.kind for finding in check_folder(folder, "triton")}
