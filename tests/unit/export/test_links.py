"""Links in untrusted folders never lead a reader or an export out of the folder, and outputs are never written through
one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from helpers import make_adapter, write_checkpoint
from oarlock.cli.main import make_parser
from oarlock.cli.parser import run_parsed
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.errors import CheckpointError, ModelError
from oarlock.export.convert import ConvertOptions, convert
from oarlock.export.export import export
from oarlock.export.request import ExportRequest
from oarlock.export.triton import export_triton
from oarlock.files import is_vacant
from oarlock.formats.links import check_links, find_foreign_entries, open_inside
from oarlock.merge.inputs import AdapterMix
from oarlock.model_config.model_folder import find_model_folder
from oarlock.models.resize import resize_embedding
from oarlock.peft.adapter_base import add_texts_of
from oarlock.peft.open_adapter import open_adapter
from oarlock.train.checkpoint.inspect import consolidate
from oarlock.train.checkpoint.manifest import MANIFEST, find_newest_checkpoint, read_manifest, verify
from oarlock.weights.folder_files import copy_file, link_file
from oarlock.weights.shard_index import shard_file_name

SECRET = "a private key"


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "private" / "key"
    path.parent.mkdir()
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


# every way to lead out of a folder: (folder, secret) -> the name in the error


def plain(folder: Path, secret: Path) -> str:
    (folder / "vocab.txt").symlink_to(secret)
    return "vocab.txt"


def relative(folder: Path, secret: Path) -> str:
    (folder / "merges.txt").symlink_to(os.path.relpath(secret, folder))
    return "merges.txt"


def through_another(folder: Path, secret: Path) -> str:
    (folder / "a").symlink_to(secret)
    (folder / "vocab.json").symlink_to("a")
    return "a"


def in_a_folder(folder: Path, secret: Path) -> str:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "x.jinja").symlink_to(secret)
    return "additional_chat_templates/x.jinja"


def a_whole_folder(folder: Path, secret: Path) -> str:
    (folder / "additional_chat_templates").symlink_to(secret.parent)
    return "additional_chat_templates"


def to_nothing(folder: Path, secret: Path) -> str:
    (folder / "chat_template.json").symlink_to("gone")
    return "chat_template.json"


def to_itself(folder: Path, secret: Path) -> str:
    (folder / "tokenizer.model").symlink_to("tokenizer.model")
    return "tokenizer.model"


def to_a_device(folder: Path, secret: Path) -> str:
    (folder / "tokenizer.model").symlink_to("/dev/zero")
    return "tokenizer.model"


def to_a_process(folder: Path, secret: Path) -> str:
    (folder / "vocab.txt").symlink_to("/proc/self/environ")
    return "vocab.txt"


def a_pipe(folder: Path, secret: Path) -> str:
    os.mkfifo(folder / "added_tokens.json")
    return "added_tokens.json"


def of_the_weights(folder: Path, secret: Path) -> str:
    shutil.move(folder / "model.safetensors", secret.parent / "w")
    (folder / "model.safetensors").symlink_to(secret.parent / "w")
    return "model.safetensors"


def not_of_a_cache(folder: Path, secret: Path) -> str:
    """A folder that looks like a cache, but whose blobs folder is a link."""
    cache = folder.parent / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    shutil.move(folder, cache / "snapshots" / "rev")
    (cache / "blobs").symlink_to(secret.parent)
    folder.symlink_to(cache / "snapshots" / "rev")
    (folder / "vocab.txt").symlink_to("../../blobs/key")
    return "vocab.txt"


WAYS = [
    plain, relative, through_another, in_a_folder, a_whole_folder, to_nothing, to_itself, to_a_device, to_a_process,
    a_pipe, of_the_weights, not_of_a_cache,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_link_out_of_a_model_is_named(model, secret, tmp_path, way):
    name = way(model, secret)
    for read in (lambda: find_model_folder(str(model), with_weights=True), lambda: load_tokenizer(str(model))):
        with pytest.raises(ModelError) as error:
            read()
        assert str(error.value).startswith(f"{model / name} is a") and "cp -rL" in str(error.value)
    with pytest.raises(ModelError):
        export(ExportRequest("triton", str(model), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_every_command_refuses_links_out_of_a_model(model, tiny_model, secret, tmp_path):
    adapter = make_adapter(model, tmp_path / "adapter")
    plain(model, secret)
    plain(adapter, secret)
    with pytest.raises(ModelError, match=r"adapter/vocab\.txt is a link"):
        open_adapter(adapter)
    with pytest.raises(ModelError, match=r"adapter/vocab\.txt is a link"):
        AdapterMix.open([adapter])
    with pytest.raises(ModelError, match=r"vocab\.txt is a link"):
        add_texts_of(adapter, tiny_model, tmp_path)
    for words in (["convert", "--to", "hf", "--input"], ["ask"], ["export", "--target", "triton", "--model"]):
        more = ["a question"] if words == ["ask"] else ["--output", str(tmp_path / "out")]
        parsed = make_parser().parse_args([*words, str(model), *more])
        with pytest.raises(ModelError, match=r"model/vocab\.txt is a link"):
            run_parsed(parsed)
        assert not (tmp_path / "out").exists()


def test_links_inside_a_folder_and_a_linked_folder_are_accepted(model, tmp_path):
    shutil.move(model / "model.safetensors", model / "weights.bin.old")
    (model / "model.safetensors").symlink_to("weights.bin.old")
    (model / "sub").mkdir()
    (model / "sub" / "up").symlink_to("..")
    (tmp_path / "chosen").symlink_to(model)
    assert find_model_folder(str(tmp_path / "chosen"), with_weights=True) == tmp_path / "chosen"
    os.link(model / "config.json", model / "same.json")
    check_links(tmp_path / "chosen")
    export_triton(tmp_path / "chosen", {}, tmp_path / "out")
    copied = tmp_path / "out/oarlock/1/model/model.safetensors"
    assert copied.samefile(model / "weights.bin.old") and not copied.is_symlink()


def test_hidden_files_are_ignored(model, secret):
    (model / ".cache").mkdir()
    (model / ".cache" / "x").symlink_to(secret)
    check_links(model)
    assert [found.path.name for found in find_foreign_entries(model, hidden=True)] == ["x"]


def in_a_cache(model: Path, place: Path) -> Path:
    """A model as huggingface_hub stores it."""
    snapshot, blobs = place / "models--some--model/snapshots/0a1b", place / "models--some--model/blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / f"{number:040x}")
        link.symlink_to(os.path.relpath(blobs / f"{number:040x}", link.parent))
    return snapshot


def test_links_inside_a_cache_are_followed(model, secret, tmp_path):
    snapshot = in_a_cache(model, tmp_path / "hub")
    assert load_tokenizer(str(snapshot)).vocab_size == load_tokenizer(str(model)).vocab_size
    export(ExportRequest("hf", str(snapshot), tmp_path / "hf"))
    export_triton(snapshot, {}, tmp_path / "out")
    weights = tmp_path / "out/oarlock/1/model/model.safetensors"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*")) and weights.stat().st_nlink == 2
    (snapshot / "vocab.txt").symlink_to("../../../../private/key")
    with pytest.raises(ModelError, match=r"vocab\.txt is a link that leads out of the folder, to .*private/key"):
        find_model_folder(str(snapshot), with_weights=True)
    (snapshot / "vocab.txt").unlink()
    (snapshot / "vocab.txt").symlink_to("../../refs")
    with pytest.raises(ModelError, match="leads out of the folder"):
        find_model_folder(str(snapshot), with_weights=True)


def test_a_folder_of_links_made_by_oarlock_leads_only_to_its_sources(model, secret, tmp_path):
    adapter = make_adapter(model, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    shutil.copy(model / "tokenizer.json", adapter)
    (tmp_path / "links").mkdir()
    folder = add_texts_of(adapter, model, tmp_path / "links")
    check_links(folder)
    (folder / "vocab.txt").symlink_to(secret)
    with pytest.raises(ModelError, match=r"vocab\.txt"):
        check_links(folder)


def test_links_created_after_the_check_are_not_followed(model, secret, tmp_path):
    (model / "vocab.txt").write_text("fine")
    check_links(model)
    (model / "vocab.txt").unlink()
    (model / "vocab.txt").symlink_to(secret)
    for copy in (copy_file, link_file):
        with pytest.raises(ModelError, match="leads out of the folder"):
            copy(model, "vocab.txt", tmp_path / "copied")
        assert not (tmp_path / "copied").exists()
    for name in ("../private/key", str(secret), "x\0"):
        with pytest.raises(ModelError):
            open_inside(model, name)


# checkpoints


def make_checkpoint(folder: Path) -> Path:
    manifest = read_manifest(write_checkpoint(folder, 4))
    (folder / MANIFEST).unlink()
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (folder / name).write_text("{}")
    manifest.seal(folder)
    return folder


def test_a_checkpoint_with_a_link_out_of_it_is_not_used(secret, tmp_path, capsys):
    folder = make_checkpoint(tmp_path / "run" / "checkpoint-4")
    assert verify(folder).step == 4
    part = folder / shard_file_name(0)
    shutil.move(part, secret.parent / "part")
    part.symlink_to(secret.parent / "part")
    for read in (lambda: verify(folder), lambda: consolidate(folder, tmp_path / "out", 10**9, check=False)):
        with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors is a link that leads out"):
            read()
    assert find_newest_checkpoint(tmp_path / "run") is None
    assert "checkpoint-4 is skipped: " in capsys.readouterr().out


def test_consolidation_reads_only_files_of_the_manifest(secret, tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint-4")
    for name in ("notes.txt", "id_rsa", "tokenizer.model"):
        (folder / name).write_text(SECRET)
    consolidate(folder, tmp_path / "out", 10**9)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"}


# outputs


def test_temporary_names_that_are_links_are_not_followed(model, tmp_path, secret):
    (tmp_path / ".out.partial").symlink_to(secret.parent)
    with pytest.raises(ModelError, match=r"\.out\.partial is in the way"):
        convert(model, tmp_path / "out", "hf", ConvertOptions(proof=False))
    (tmp_path / ".out.partial").unlink()
    (tmp_path / ".out.merged").symlink_to(secret.parent)
    adapter = make_adapter(model, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"\.out\.merged is in the way"):
        export(ExportRequest("vllm", str(model), tmp_path / "out", (adapter,)))
    assert [path.name for path in secret.parent.iterdir()] == ["key"] and secret.read_text() == SECRET
    assert not (tmp_path / "out").exists()


def test_a_link_of_another_user_is_refused_as_output(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "empty")
    assert is_vacant(tmp_path / "out")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert not is_vacant(tmp_path / "out")


def test_an_output_inside_the_input_does_not_contain_itself(model):
    convert(model, model / "hf", "hf", ConvertOptions(proof=False))
    export_triton(model, {}, model / "served")
    assert not (model / "served/oarlock/1/model/hf").exists()
    with pytest.raises(ModelError, match="nothing to add"):
        resize_embedding(model, str(model), model / "resized")
