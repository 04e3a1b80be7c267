"""The repository passed to Triton: our code with the data of an exported directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from oarlock.errors import ConfigError
from oarlock.serve.supervision import restarting_process as part_module
from oarlock.serve.triton.served_repository import make_served_tree
from oarlock.triton_repository.config_pbtxt import read_triton_config

TEMPLATES = Path(part_module.__file__).parents[2] / "triton_repository" / "models"


# Triton's repository


@pytest.fixture
def repository(tmp_path):
    """A repository as `oarlock export` writes it, with code that must not run."""
    for kind in ("oarlock", "oarlock_infer", "oarlock_json"):
        version = tmp_path / "repository" / kind / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text("raise SystemExit('code of the repository')")
        (version.parent / "config.pbtxt").write_text((TEMPLATES / kind / "config.pbtxt").read_text())
    (tmp_path / "repository/oarlock/1/model").mkdir()
    (tmp_path / "repository/oarlock/1/adapters/pirate").mkdir(parents=True)
    return tmp_path / "repository"


def add(repository, model, text):
    with open(repository / model / "config.pbtxt", "a", encoding="utf-8") as file:
        file.write(text)


def test_the_repository_combines_oarlock_code_with_exported_data(repository, tmp_path):
    add(repository, "oarlock", 'parameters { key: "max_batch" value { string_value: "3" } }\n')
    add(repository, "oarlock", 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/tmp/evil.tar.gz" } }\n')
    tree = make_served_tree(repository, tmp_path / "shown")
    assert set(tree.kinds) == {"oarlock", "oarlock_infer", "oarlock_json"}
    for name in tree.kinds:
        version = tree.folder / name / "1"
        assert (version / "model.py").read_text() == (TEMPLATES / name / "model.py").read_text()
        assert (version / "lib" / "oarlock").resolve() == TEMPLATES.parents[1].resolve()
    assert (tree.folder / "oarlock/1/model").resolve() == (repository / "oarlock/1/model").resolve()
    config = read_triton_config(tree.folder / "oarlock" / "config.pbtxt")
    assert {key: value.string_value for key, value in config.parameters.items()} == {
        "max_batch": "3",
        "adapters": "pirate",
    }
    before = (tree.folder / "oarlock/1/model.py").stat().st_mtime_ns
    tree.write("oarlock")
    assert (tree.folder / "oarlock/1/model.py").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("model", "text", "words"),
    [
        ("oarlock", 'backend: "onnxruntime"', "backend"),
        ("oarlock_infer", "instance_group [ { count: 100000 } ]", "it must be 1 to 256 in all"),
        ("oarlock_infer", "instance_group [ { count: -3 } ]", "it must be 1 to 256 in all"),
        ("evil", 'name: "evil"', "not a model of `oarlock export --target triton`"),
    ],
)
def test_other_models_and_backends_are_refused(repository, tmp_path, model, text, words):
    (repository / model).mkdir(exist_ok=True)
    if model == "oarlock":
        (repository / model / "config.pbtxt").write_text(text)
    else:
        add(repository, model, text)
    with pytest.raises(ConfigError, match=words):
        make_served_tree(repository, tmp_path / "shown")
