"""Untrusted recipes: each is read, or refused in one sentence with file and line; only regular files are opened."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest

from oarlock.config.finetune import FinetuneConfig
from oarlock.config.load import load_config
from oarlock.config.options import list_option_specs
from oarlock.config.pretrain import PretrainConfig
from oarlock.config.problems import Problems
from oarlock.config.recipe_files import MOST_FILES, RecipeFiles
from oarlock.errors import ConfigError
from oarlock.formats.yaml_file import MAX_BYTES


def value_of_option(path: Path, name: str) -> Any:
    specs = list_option_specs(PretrainConfig)
    return specs[name].convert(RecipeFiles(specs, Problems()).read(path)[name][0])


@pytest.mark.parametrize("text", ["010", "1_000", "12:30", "yes", "1.50", "0x1F", "2024-01-01", "1e5", "=", ".inf"])
def test_text_is_read_verbatim(tmp_path, text):
    (tmp_path / "run.yaml").write_text(f"output_dir: {text}\n")
    assert value_of_option(tmp_path / "run.yaml", "output_dir") == text


def test_numbers_are_those_of_the_core_schema(tmp_path):
    (tmp_path / "run.yaml").write_text("max_steps: 010\nseed: 1:30\n")
    assert value_of_option(tmp_path / "run.yaml", "max_steps") == 10  # not 8
    with pytest.raises(ValueError, match="must be a whole number; got '1:30'"):
        value_of_option(tmp_path / "run.yaml", "seed")


def load(folder: Path, text: str | bytes, config=PretrainConfig):
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(config, [str(path), "--do_train"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: 1\nmax_steps: &a [*a]\n", "run.yaml:2: *a is used inside its own value"),
        ("[a, b]: 1\n", "run.yaml:1: a key must be a string"),
        ("seed: 1\nschedule: {max_steps: 1,\n  [x]: 2}\n", "run.yaml:3: a key must be a string"),
        ("schedule: {max_steps: 1, max_steps: 2}\n", "run.yaml:1: max_steps is already defined at line 1"),
        ("output_dir: 2024-02-30\n", "run.yaml:1: 2024-02-30 is a date that does not exist"),
        ("seed: !!int abc\n", "run.yaml:1: abc is not an integer"),
        ("seed: !!int [1]\n", "run.yaml:1: not valid YAML: expected a scalar node"),
        ("seed: 1\nmax_steps: " + "9" * 5000, "run.yaml:2: an integer of more than 40 digits"),
        ("seed: 1\nmax_steps: '" + "9" * 300 + "'", "run.yaml:2: max_steps must be a whole number; got '999"),
        ("max_steps: " + "9" * 30, "run.yaml:1: max_steps must be a whole number"),
        ("seed: 4294967296", "run.yaml:1: seed must lie in [0, 4294967295]"),
        ("learning_rate: .inf", "run.yaml:1: learning_rate must be a number; got inf"),
        ("learning_rate: 1e999", "run.yaml:1: learning_rate must be a number; got '1e999'"),
        ("max_steps: " + "[" * 3000 + "]" * 3000, "run.yaml:1: lists and mappings more than 32 levels deep"),
        ("seed: 1\n---\nseed: 2\n", "run.yaml:2: not valid YAML: a second document begins"),
        ('output_dir: "a\\0b"\n', "run.yaml:1: a value can't hold a NUL"),
        ('seed: 1\ninclude: "a\\0b"\n', "run.yaml:2: a value can't hold a NUL"),
        ("output_dir: a\0b\n", "run.yaml:1: not valid YAML: a character that is not allowed (U+0000)"),
        (b"output_dir: \xff\n", "run.yaml:1: not valid YAML: not UTF-8"),
        ("include: [1]\n", "run.yaml:1: include expects file names; got 1"),
        ("include: {a: b}\n", "run.yaml:1: include expects file names"),
        ("include: ''\n", "run.yaml:1: include expects file names"),
        ("include: " + "x" * 3000, "run.yaml:1: include: "),
        ("include: " + "a/" * 200_000, "run.yaml:1: include expects file names; got 'a/a/"),
        ("split: '" + "1," * 100_000 + "'", "--split 1,1,1"),
        ("output_dir: " + "x" * MAX_BYTES, "bytes is too large for a YAML file"),
        ("- seed\n", "run.yaml:1: expected `option: value` lines"),
        ("seed", "run.yaml:1: expected `option: value` lines"),
    ],
)  # fmt: skip
def test_files_that_are_not_recipes_are_refused(tmp_path, text, reason):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 6000


def test_paths_that_are_not_regular_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{short}/socket")
        for name, reason in {
            "pipe": "a pipe, not a regular file",
            "/dev/zero": "a device, not a regular file",
            f"{short}/socket": "a socket, not a regular file",
            ".": "a folder, not a regular file",
            "circle": "its symbolic links form a loop",
        }.items():
            with pytest.raises(ConfigError, match=reason):
                load_config(PretrainConfig, [str(tmp_path / name)])
            with pytest.raises(ConfigError, match=rf"run.yaml:2: include: .*{reason}"):
                load(tmp_path, f"seed: 1\ninclude: [{name}]\n")


def test_each_include_is_read_once(tmp_path, monkeypatch):
    """Reading the last file 3^13 times would take forever; its fault is reported once."""
    for i in range(1, 14):
        (tmp_path / f"e{i}.yaml").write_text(f"include: [e{i + 1}.yaml, ./e{i + 1}.yaml, e{i + 1}.yaml]\nseed: {i}\n")
    (tmp_path / "e14.yaml").write_text("max_steps: 3\nsed: 1\n")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "include: [e1.yaml, e2.yaml, e1.yaml]\n")
    assert str(caught.value).endswith("e14.yaml:2: unknown key sed; did you mean seed?")
    (tmp_path / "e14.yaml").write_text("max_steps: 3\n")
    loaded = load(tmp_path, "include: [e1.yaml, e2.yaml]\n")
    # The later include takes precedence.
    assert (loaded.config.schedule.max_steps, loaded.config.runtime.seed) == (3, 2)
    assert loaded.origins["seed"].endswith("e2.yaml:2")


def test_the_number_of_includes_is_bounded(tmp_path):
    for i in range(MOST_FILES + 1):
        (tmp_path / f"e{i}.yaml").write_text(f"include: e{i + 1}.yaml\n")
    with pytest.raises(ConfigError, match=rf"e{MOST_FILES - 1}.yaml:1: include: .*more than {MOST_FILES} files"):
        load(tmp_path, "include: e0.yaml\n")
    (tmp_path / "large.yaml").write_text("# " + "x" * (MAX_BYTES // 2) + "\n")
    (tmp_path / "larger.yaml").write_text("# " + "x" * (MAX_BYTES // 2) + "\n")
    with pytest.raises(ConfigError, match=r"run.yaml:1: include: .*larger.yaml: .* too large for a YAML file"):
        load(tmp_path, "include: [large.yaml, larger.yaml]\n")


def test_a_circle_of_includes_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("include: b.yaml\n")
    (tmp_path / "b.yaml").write_text("seed: 1\ninclude: run.yaml\n")
    with pytest.raises(ConfigError, match=r"b.yaml:2: include: .*\(through run.yaml -> a.yaml -> b.yaml -> run.yaml"):
        load(tmp_path, "include: a.yaml\n")


def test_thousands_of_problems_end_early(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "".join(f"unknown_{i}: 1\n" for i in range(9000)))
    assert str(caught.value).count("unknown key") == 50
    assert str(caught.value).endswith("stopped after these")
    with pytest.raises(ConfigError, match="unknown key xxx"):
        load(tmp_path, "? " + "x" * 100_000 + "\n: 1\n")


@pytest.mark.parametrize(
    "text",
    [
        'dataset_name_or_path: ["1 a' + " " * 200_000 + 'b"]\n',
        "dataset_name_or_path: [" + "x, " * 9000 + "]\n",
        "columns: {prompt: a, response: '" + "x" * 200_000 + "'}\n",
    ],
)
def test_long_values_are_read_in_linear_time(tmp_path, text):
    """Each once took time quadratic in its length, or worse."""
    assert load(tmp_path, text, FinetuneConfig).config


def test_valid_aliases_merges_dates_and_marks(tmp_path):
    text = "\ufeffschedule: &s\n  max_steps: &n 7\nseed: *n\noutput_dir: 2024-02-29\nsplit: '1,1,1'\nbf16: no\n"
    loaded = load(tmp_path, text).config
    assert (loaded.schedule.max_steps, loaded.runtime.seed, loaded.checkpoint.output_dir) == (7, 7, "2024-02-29")
