"""Damaged or forged checkpoints: a manifest is exactly what was written and fits its folder, or is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.flips import flip_bits
from helpers import write_checkpoint
from oarlock.cli.main import main as oarlock
from oarlock.errors import CheckpointError
from oarlock.files import compute_sha256
from oarlock.formats.sealed import SEAL, check_seal, seal_text
from oarlock.train.checkpoint.inspect import consolidate
from oarlock.train.checkpoint.manifest import (
    MANIFEST,
    TRAINER_STATE,
    find_newest_checkpoint,
    list_checkpoints,
    read_manifest,
    verify,
)
from oarlock.train.checkpoint.writer import rotate
from oarlock.weights.shard_index import INDEX, shard_file_name
from oarlock.weights.sharded_store import ShardedStore

LESS = {"shape": [1 << 40, 25], "axis": 0, "runs": [[0, 20]]}  # an existing shard of a tensor that is missing


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    for step in (2, 4):
        write_checkpoint(output / f"checkpoint-{step}", step)
    return output


@pytest.fixture
def folder(written, tmp_path) -> Path:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return tmp_path / "checkpoint-4"


def reseal(folder: Path, change=lambda content: None) -> None:
    """Write a manifest with other content and valid checksums of itself and of all files."""
    content = json.loads((folder / MANIFEST).read_text())
    for name in content["files"]:
        path = folder / name
        if path.is_file():
            content["files"][name] = {"bytes": path.stat().st_size, "sha256": compute_sha256(path)}
    change(content)
    del content[SEAL]
    (folder / MANIFEST).write_text(seal_text(content))


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def expect_refusal(folder: Path, expected: str, capsys) -> None:
    """Check that verify, resume and consolidate refuse a checkpoint, each with the same reason."""
    with pytest.raises(CheckpointError, match=expected) as error:
        verify(folder)
    assert "\n" not in str(error.value)
    assert find_newest_checkpoint(folder.parent)[0].name == "checkpoint-2"
    assert f"checkpoint-4 is skipped: {error.value}" in capsys.readouterr().out
    for check in (True, False):
        try:
            consolidate(folder, folder.parent / "one", 1 << 30, check)
        except CheckpointError as problem:
            assert not check or str(problem) == str(error.value)
        else:
            assert not check  # without the checksums of the files only the manifest is checked
    with pytest.raises(SystemExit, match="1"):
        oarlock(["checkpoint", "verify", str(folder)])


def test_a_bit_flip_in_any_file_is_detected(folder):
    counts = flip_bits(folder, 150)
    assert counts["found"] == 150 and counts["files"] == 4


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: json.dumps(json.loads(text)),
        lambda text: text.rstrip(),
        lambda text: text + "\n",
        lambda text: text.replace('"step": 4', '"step": 5'),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: json.dumps(json.loads(text), indent=1) + "\n",
        lambda text: text[: len(text) // 2],
        lambda text: "",
    ],
)
def test_the_manifest_reads_back_unchanged(folder, rewrite, capsys):
    path = folder / MANIFEST
    before = path.read_bytes()
    path.write_bytes(rewrite(before.decode()).encode())
    if path.read_bytes() == before:  # the same form, so the same bytes
        assert verify(folder).step == 4
    else:
        expect_refusal(folder, "checksum|not valid JSON", capsys)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers() | st.text(max_size=9)))
def test_the_seal_covers_every_byte(content):
    text = seal_text({"first": 1} | content).encode()
    check_seal(text, "x")
    for i in range(0, len(text), 7):
        changed = bytearray(text)
        changed[i] ^= 1 << (i % 8)
        with pytest.raises(Exception, match="checksum"):
            check_seal(bytes(changed), "x")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.update(step="four"), "step must be an integer; got 'four'"),
        (lambda c: c.update(step=5), "its manifest belongs to step 5"),
        (lambda c: c.update(step=True), "step must be an integer"),
        (lambda c: c.update(samples=-1), "samples"),
        (lambda c: c.update(samples=1 << 53), "4 steps can't consume"),
        (lambda c: c.update(samples=10**30), "samples must be less than or equal to"),
        (lambda c: c.pop("seed"), "seed is missing"),
        (lambda c: c.update(files=[]), "files must be an object"),
        (lambda c: c.update(files={}), "tensors.json and trainer_state.json missing from its list of files"),
        (lambda c: c["files"].pop(shard_file_name(0)), "rank-00000.safetensors is in tensors.json and not in the list"),
        (lambda c: c["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}), "'../x' is not a valid file name"),
        (lambda c: c["files"].update({"/etc/x": {"bytes": 1, "sha256": "0" * 64}}), "'/etc/x' is not a valid file name"),
        (lambda c: c["files"].update({"a": {"bytes": 1, "sha256": "z" * 64}}), "is not a valid file name with a checksum"),
        (lambda c: c["files"].update({"a": {"bytes": 1, "sha256": "0" * 64}}), "a is missing"),
        (lambda c: c["files"].update({"a": {"bytes": 1}}), "sha256 is missing"),
        (lambda c: c.update(best={"metric": "m", "value": 1.0, "step": 1, "name": "../x", "evaluations_since": 0}),
         "'../x' is not a valid name of the best"),
        (lambda c: c.update(best={"metric": "m"}), "missing"),
        (lambda c: c.update(lr_scheduler={"last_epoch": 4}), "last_lr is missing"),
        (lambda c: c.update(loss_window=[1.0]), "loss_window"),
        (lambda c: c.update(config={"learning_rate": "fast"}), "config.learning_rate must be a number"),
        (lambda c: c.update(config={"learning_rate": -1.0}), "config.learning_rate must be"),
        (lambda c: c.update(config={"max_steps": {}}), "config.max_steps"),
        (lambda c: c.update(format=2), "format 2; this version reads format 3"),
        (lambda c: c.update(other=1), "other is not a known field here"),
    ],
)  # fmt: skip
def test_a_false_manifest_is_refused(folder, change, expected, capsys):
    reseal(folder, change)
    expect_refusal(folder, expected, capsys)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (TRAINER_STATE, lambda c: c.update(global_step="4"), "global_step must be an integer"),
        (TRAINER_STATE, lambda c: c.update(global_step=3), "step 3, but the manifest says 4"),
        (TRAINER_STATE, lambda c: c.update(class_name="x"), "class_name is not a known field"),
        (INDEX, lambda c: c.update({"../x.safetensors": {}}), "is not the name of a safetensors file"),
        (
            INDEX,
            lambda c: c.update({"x.safetensors": c.pop(shard_file_name(0))}),
            "is in the list of files and not in tens",
        ),
        (
            INDEX,
            lambda c: c[shard_file_name(0)]["model/head.weight"].update(shape=[1 << 40, 25]),
            "27,487,790,694,400 elem",
        ),
        (INDEX, lambda c: c[shard_file_name(0)]["model/head.weight"].update(LESS), "is incomplete"),
        (INDEX, lambda c: c[shard_file_name(0)]["model/head.weight"].update(shape=[20, 24]), "480 elements"),
        (INDEX, lambda c: c[shard_file_name(0)]["model/head.weight"].update(shape=[20.0, 25]), "must be an integer"),
        (INDEX, lambda c: c[shard_file_name(0)]["model/head.weight"].update(shape=[-20, -25]), "shape"),
        (
            INDEX,
            lambda c: c[shard_file_name(0)]["model/head.weight"].update(axis=2, runs=[[0, 1]]),
            "can't be cut along",
        ),
        (
            INDEX,
            lambda c: c[shard_file_name(0)]["model/head.weight"].update(axis=0, runs=[[0, 11], [10, 9]]),
            "overlap",
        ),
        (INDEX, lambda c: c[shard_file_name(0)]["model/head.weight"].update(axis=0, runs=[[1, 20]]), "or leave the 20"),
        (
            INDEX,
            lambda c: c[shard_file_name(0)]["model/head.weight"].update(flat=[0, 501]),
            "can't be elements 0 to 501",
        ),
        (INDEX, lambda c: c[shard_file_name(0)].update({"other": {"shape": [1]}}), "has no kind and name"),
        (INDEX, lambda c: c[shard_file_name(0)].update({"model/x": {"shape": [1]}}), "missing"),
        (INDEX, lambda c: c[shard_file_name(0)].pop("model/head.weight"), "not of the same weights"),
        (
            INDEX,
            lambda c: c[shard_file_name(0)]["moment1/head.weight"].update(shape=[25, 20]),
            "not a state of a weight of",
        ),
    ],
)
def test_false_files_with_valid_checksums_are_refused(folder, name, change, expected, capsys):
    edit(folder / name, change)
    reseal(folder)
    expect_refusal(folder, expected, capsys)


def test_an_index_alone_allocates_no_memory(folder):
    edit(folder / INDEX, lambda c: c[shard_file_name(0)]["model/head.weight"].update(LESS))
    with pytest.raises(CheckpointError, match="is incomplete"):
        ShardedStore.open(folder)


@pytest.mark.parametrize("name", [MANIFEST, INDEX, TRAINER_STATE, shard_file_name(0)])
@pytest.mark.parametrize("kind", ["pipe", "link out", "link inside", "folder", "nothing"])
def test_something_else_in_place_of_a_file_is_refused(folder, name, kind, capsys):
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link out":
        (folder.parent / "elsewhere").write_bytes(content)
        path.symlink_to(folder.parent / "elsewhere")
    elif kind == "link inside":
        (folder / ".other").write_bytes(content)
        path.symlink_to(".other")
    elif kind == "folder":
        path.mkdir()
    if kind == "link inside" and name == MANIFEST:
        return  # the bytes in the folder are those that were written: nothing to refuse
    expect_refusal(folder, "pipe|link|not a regular file|a folder|missing|no manifest.json", capsys)


def test_unlisted_files_are_named(folder, capsys):
    (folder / "added_tokens.json").write_text("{}")
    (folder / "more").mkdir()
    (folder / "more" / "x").write_text("")
    assert find_newest_checkpoint(folder.parent)[0] == folder
    assert "contains files that its manifest does not list; they are ignored: added_tokens.json, more/x" in (
        capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="1"):
        oarlock(["checkpoint", "verify", str(folder)])
    assert "added_tokens.json, more/x: not in the manifest" in capsys.readouterr().err
    consolidate(folder, folder.parent / "one", 1 << 30)
    assert sorted(path.name for path in (folder.parent / "one").iterdir()) == ["model.safetensors"]


def test_non_finite_numbers_in_a_manifest(tmp_path):
    """A loss in fp16 may be infinite."""
    for loss in (float("inf"), float("nan")):
        folder = write_checkpoint(tmp_path / f"{loss}", 2, loss_window=(loss, 3))
        assert read_manifest(folder).loss_window == (None, 3)


def test_a_later_damaged_checkpoint_does_not_delete_the_new_one(tmp_path):
    """A run resumed from step 2 writes step 3 while a damaged checkpoint of step 9 exists."""
    for step in (1, 2, 3, 9):
        write_checkpoint(tmp_path / f"checkpoint-{step}", step)
    rotate(tmp_path, 1, newest=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-3"]
