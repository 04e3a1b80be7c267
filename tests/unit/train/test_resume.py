"""Checkpoints: damage, resuming, rotation, and what a new run deletes."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from helpers import make_flags, write_checkpoint
from oarlock.config import FinetuneConfig, load_config
from oarlock.config.load import flatten
from oarlock.errors import CheckpointError
from oarlock.train.checkpoint.manifest import find_newest_checkpoint, list_checkpoints, read_manifest, verify
from oarlock.train.checkpoint.resume import find_resume_point
from oarlock.train.checkpoint.writer import rotate
from oarlock.train.output.folder_guard import explain_error
from oarlock.train.reporters.row_file import cut_rows_after

# manifests and checkpoints


def make_checkpoint(output: Path, step: int, **changes) -> Path:
    folder = output / f"checkpoint-{step}"
    config = flatten(load_config(FinetuneConfig, ["--do_train"]).config)
    return write_checkpoint(folder, step, samples=step * 8, loss_window=(1.5, 2), config=config, **changes)


def test_a_complete_checkpoint_verifies(tmp_path):
    manifest = verify(make_checkpoint(tmp_path, 5))
    assert manifest.step == 5 and manifest.samples == 40 and manifest.loss_window == (1.5, 2)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: flip_bit(f / "rank-00000.safetensors"), "checksum differs"),
        (lambda f: (f / "rank-00000.safetensors").write_bytes(b"short"), "has 5 bytes, but the manifest says"),
        (lambda f: (f / "rank-00000.safetensors").unlink(), "is missing"),
        (lambda f: (f / "manifest.json").unlink(), "an unfinished one"),
        (lambda f: (f / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "manifest.json").write_text('{"format": 99}'), "format 99"),
        (lambda f: (f / "manifest.json").write_text('{"format": 2}'), "format 2; this version reads format 3"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, capsys, damage, expected):
    make_checkpoint(tmp_path, 5)
    damage(make_checkpoint(tmp_path, 10))
    with pytest.raises(CheckpointError, match=expected):
        verify(tmp_path / "checkpoint-10")
    folder, manifest = find_newest_checkpoint(tmp_path)
    assert folder.name == "checkpoint-5" and manifest.step == 5
    assert "checkpoint-10 is skipped" in capsys.readouterr().out


def config_for(output: Path, **options) -> FinetuneConfig:
    return load_config(FinetuneConfig, make_flags(do_train=1, output_dir=output, **options)).config


def test_a_run_of_the_same_configuration_resumes(tmp_path):
    make_checkpoint(tmp_path, 5)
    point = find_resume_point(config_for(tmp_path, logging_steps=3, per_device_train_batch_size=2), "data")
    assert point.manifest.step == 5
    assert find_resume_point(config_for(tmp_path / "empty"), "data") is None


def test_another_run_is_refused_with_the_differences(tmp_path):
    make_checkpoint(tmp_path, 5)
    with pytest.raises(CheckpointError) as error:
        find_resume_point(config_for(tmp_path, learning_rate=1e-2), "other")
    text = str(error.value)
    assert "learning_rate was 5e-05, is 0.01" in text and "the training data changed" in text
    assert "--overwrite_output_dir" in text and "--resume_from_checkpoint" in text


def test_an_explicit_resume_allows_differences(tmp_path, capsys):
    folder = make_checkpoint(tmp_path, 5)
    config = config_for(tmp_path / "new", learning_rate=1e-2, resume_from_checkpoint=folder)
    assert find_resume_point(config, "data").folder == folder
    assert "learning_rate was" in capsys.readouterr().out


def test_overwrite_deletes_only_the_run(tmp_path):
    make_checkpoint(tmp_path, 5)
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    assert find_resume_point(config_for(tmp_path, overwrite_output_dir=1), "data") is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]


def test_an_evaluation_only_run_neither_resumes_nor_deletes(tmp_path):
    make_checkpoint(tmp_path, 5)
    config = load_config(FinetuneConfig, make_flags(do_eval=1, output_dir=tmp_path, overwrite_output_dir=1)).config
    assert find_resume_point(config, "data") is None
    assert list_checkpoints(tmp_path)


def test_files_of_a_killed_save_are_removed(tmp_path):
    make_checkpoint(tmp_path, 5)
    for name in (".checkpoint-10.partial", ".checkpoint-2.deleted"):
        (tmp_path / name).mkdir()
    find_resume_point(config_for(tmp_path), "data")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [40, 30]),
        (1, None, [40]),
        (2, "checkpoint-10", [40, 10]),
        (1, "checkpoint-10", [40, 10]),
        (None, None, [40, 30, 20, 10]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, keep, best, left):
    for step in (10, 20, 30, 40):
        make_checkpoint(tmp_path, step)
    rotate(tmp_path, keep, best)
    assert [int(p.name.split("-")[1]) for p in list_checkpoints(tmp_path)] == left


def test_reasons_of_a_failed_save(tmp_path):
    assert "no space left on the disk" in explain_error(OSError(errno.ENOSPC, "No space left on device"), tmp_path)
    assert "no space left" in explain_error(RuntimeError("I/O error: No space left on device (os error 28)"), tmp_path)
    assert explain_error(ValueError("odd"), tmp_path) == "odd"


def test_rows_after_a_checkpoint_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n{"step": 15}\n{"step": 1')
    cut_rows_after(path, 10)
    assert path.read_text() == '{"step": 5}\n{"step": 10}\n'
    cut_rows_after(path, 0)
    assert path.read_text() == ""


def test_read_manifest_refuses_other_folders(tmp_path):
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_manifest(tmp_path)
