"""Checkpoints of several ranks: `oarlock checkpoint`, saving in the background, and saves that fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from disturbed_saves import RUNS
from safetensors.numpy import load_file

from helpers import read_rows
from oarlock.cli.main import main as oarlock
from oarlock.data.corpus.build_corpus import BuildOptions, build_corpus
from oarlock.train.checkpoint.manifest import list_checkpoints, read_manifest, verify
from oarlock.weights.shard_index import shard_file_name
from oarlock.weights.sharded_store import ShardedStore

LLM = Path(__file__).resolve().parents[2] / "llm"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_config) -> Path:
    """A folder with the outputs, the logs and the exit codes of all runs."""
    folder = tmp_path_factory.mktemp("checkpoints")
    texts = [f"document {i}: " + " ".join(str(n) for n in range(i % 60 + 20)) for i in range(100)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    build_corpus(BuildOptions((str(folder / "text.jsonl"),), str(tiny_config), str(folder / "data" / "c"), workers=1))
    shutil.copytree(tiny_config, folder / "model")
    shutil.copytree(folder / "data", folder / "foreign")
    ids = np.fromfile(folder / "foreign" / "c.bin", np.uint16)
    ids[::50] = 600  # the model has 512 rows, and the notes of the corpus do not mention it
    ids.tofile(folder / "foreign" / "c.bin")
    program = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("disturbed_saves.py")), str(folder)],
        env={**os.environ, "PYTHONPATH": f"{LLM}:{LLM.parent / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert program.returncode == 0, program.stdout[-3000:] + program.stderr[-3000:]
    return folder


def codes(runs: Path, name: str) -> list[int]:
    return json.loads((runs / "codes.json").read_text())[name]


def log(runs: Path, name: str, rank: int = 0) -> str:
    return (runs / "log" / name / f"workerlog.{rank}").read_text()


@pytest.fixture
def command(capsys):
    """Run `oarlock checkpoint ...` and return (exit code, output)."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*words) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            oarlock(["checkpoint", *map(str, words)])
        printed = capsys.readouterr()
        return stop.value.code, printed.out + printed.err

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def copy(runs, tmp_path):
    """A copy of a checkpoint that a test may damage."""
    return shutil.copytree(runs / "split" / "checkpoint-4", tmp_path / "checkpoint-4")


@pytest.mark.parametrize("name", ["split", "stage3", "background", "resumed"])
def test_all_runs_succeed(runs, name):
    assert not any(codes(runs, name)), log(runs, name)


@pytest.mark.parametrize("name", ["split", "stage3"])
def test_every_rank_writes_its_own_shards(runs, name):
    """Every element is written once, the ranks write equal amounts, and almost nothing is sent."""
    ranks, folder = RUNS[name][0], runs / name / "checkpoint-4"
    sizes = [(folder / shard_file_name(rank)).stat().st_size for rank in range(ranks)]
    model = load_file(runs / name / "model.safetensors")
    with ShardedStore.open(folder) as pieces:
        for kind in ("model", "moment1", "moment2"):
            ranges = [piece.range for name in model for _, piece in pieces.where[f"{kind}/{name}"]]
            assert sum(stop - start for start, stop in ranges) == sum(array.size for array in model.values())
    assert max(sizes) < 1.5 * sum(sizes) / ranks
    for save in read_rows(runs / name / "sent-0.jsonl"):
        assert 0 < save["bytes"] < 0.1 * sum(sizes), save


def test_inspect_lists_the_checkpoint(runs, command):
    folder = runs / "split" / "checkpoint-4"
    code, text = command("inspect", folder)
    manifest = read_manifest(folder)
    assert code == 0 and "step            4\n" in text and f"samples seen    {manifest.samples}\n" in text
    assert "tensor 2" in text and "pipeline 2" in text and "float32" in text
    assert all(f"{kind:15s} 21 tensors, 51,360 elements" in text for kind in ("model", "moment1", "moment2"))
    code, text = command("inspect", folder, "--tensors")
    assert "model/llama.layers.1.mlp.up_proj.weight [32, 64] axis 1 [32:64] in rank-0000" in text
    code, text = command("inspect", runs / "stage3" / "checkpoint-4", "--tensors")
    assert "model/llama.layers.1.mlp.up_proj.weight [32, 64] elements 1024:2048 in rank-00001" in text
    assert "not a checkpoint" in command("inspect", runs / "data")[1]


def test_verify_finds_damage(runs, command, copy):
    code, text = command("verify", copy)
    assert code == 0 and f"{copy}: complete (" in text and "step 4" in text
    for name in (shard_file_name(2), "tensors.json", "tokenizer.json", "config.json"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        code, text = command("verify", copy)
        assert code == 1 and f"{copy / name}: checksum differs" in text, text
        (copy / name).write_bytes(content[:-1])
        code, text = command("verify", copy)
        assert code == 1 and f"{copy / name} has " in text, text
        (copy / name).unlink()
        code, text = command("verify", copy)
        assert code == 1 and f"{copy / name} is missing" in text, text
        (copy / name).write_bytes(content)
    assert command("verify", copy)[0] == 0


@pytest.mark.parametrize("name", ["split", "stage3"])
def test_a_consolidated_checkpoint_equals_the_final_model(runs, command, tmp_path, name):
    code, text = command("consolidate", runs / name / "checkpoint-4", tmp_path / "one")
    assert code == 0, text
    written = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    expected = {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    assert written == {path: (runs / name / path).read_bytes() for path in expected}
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_consolidated_checkpoint_loads_with_paddlenlp(runs, command, tmp_path):
    from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level

    import_paddle()
    from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer

    set_paddlenlp_log_level("error")
    final = load_file(runs / "split" / "model.safetensors")
    code, text = command("consolidate", runs / "split" / "checkpoint-4", tmp_path / "one", "--max-shard-size", "2e-5")
    assert code == 0, text
    assert len(list((tmp_path / "one").glob("model-*.safetensors"))) > 3
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "one"))
    found = model.state_dict()
    assert set(found) == set(final) and all(np.array_equal(found[name].numpy(), final[name]) for name in final)
    assert AutoTokenizer.from_pretrained(str(tmp_path / "one")).vocab_size == 512


def test_consolidate_refuses_bad_input(runs, command, copy, tmp_path):
    (tmp_path / "file").write_text("something")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_text("somebody's")
    for output in ("file", "full"):
        assert "is not empty" in command("consolidate", copy, tmp_path / output)[1]
    assert command("consolidate", tmp_path / "full", tmp_path / "new")[0] == 1
    (copy / shard_file_name(1)).unlink()
    code, text = command("consolidate", copy, tmp_path / "new")
    assert code == 1 and f"{copy / shard_file_name(1)} is missing" in text
    code, text = command("consolidate", copy, tmp_path / "new", "--no-verify")
    assert code == 1 and shard_file_name(1) in text and "could not be written" not in text
    assert "could not be written" in command("consolidate", runs / "split" / "checkpoint-4", "/proc/none/new")[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "file", "full"]


def test_a_checkpoint_written_in_the_background_is_identical(runs):
    """Training continues while it is written."""
    one, other = (read_manifest(runs / name / "checkpoint-2").files for name in ("stage3", "background"))
    assert one.keys() == other.keys()
    assert all(
        one[name] == other[name] for name in (shard_file_name(0), shard_file_name(1), "tensors.json", "config.json")
    )
    assert json.loads((runs / "background" / "late.json").read_text()) > 2


def test_save_total_limit(runs):
    assert [path.name for path in list_checkpoints(runs / "stage3")] == ["checkpoint-4", "checkpoint-2"]
    assert [path.name for path in list_checkpoints(runs / "split")] == ["checkpoint-4"]
    assert [path.name for path in list_checkpoints(runs / "killed")] == ["checkpoint-4"]  # by the resumed run


@pytest.mark.parametrize("name", ["full", "full_background"])
def test_a_full_disk_leaves_the_previous_checkpoint(runs, name):
    """The second save of rank 1 finds no space."""
    assert codes(runs, name) == [1, 1]
    console = log(runs, name, 0)
    assert "checkpoint-4 could not be written: no space left on the disk of" in console
    assert "checkpoint-2 is complete; the same command resumes from it" in console
    assert "Traceback" not in console + log(runs, name, 1)
    assert verify(runs / name / "checkpoint-2").step == 2
    assert [path.name for path in (runs / name).glob("*checkpoint*")] == ["checkpoint-2"]


def test_a_rank_killed_while_it_saves(runs):
    """All ranks stop, the previous checkpoint is complete, and the same command resumes from it with the same result."""
    assert codes(runs, "killed") == [1, -signal.SIGKILL]
    assert "rank 1 (pid" in log(runs, "killed") and "died without an error message" in log(runs, "killed")
    assert "checkpoint-2 is complete; the same command resumes from it" in log(runs, "killed")
    assert "Traceback" not in log(runs, "killed") and "checkpoint-2 (step 2" in log(runs, "resumed")
    expected, found = (load_file(runs / name / "model.safetensors") for name in ("stage3", "killed"))
    assert all(np.array_equal(found[name], array) for name, array in expected.items())
    assert verify(runs / "killed" / "checkpoint-4").step == 4
    assert not list((runs / "killed").glob(".checkpoint-*"))


@pytest.mark.parametrize("name", ["removed", "removed_background"])
def test_a_removed_output_folder_stops_all_ranks(runs, name):
    """It is removed before the second save: one error message, and all ranks exit."""
    assert codes(runs, name) == [1, 1]
    console = log(runs, name, 0)
    assert console.count("oarlock: error") == 1 and "was removed during the run. There is no earlier" in console
    assert "Traceback" not in console + log(runs, name, 1) and not (runs / name).exists()


@pytest.mark.parametrize("name", ["ids", "ids_at_opening"])
def test_ids_beyond_the_vocabulary_are_reported(runs, name):
    """When the corpus is opened, or by the process that reads the sample if it was not checked then."""
    assert codes(runs, name) == [1, 1]
    said = {rank: log(runs, name, rank) for rank in (0, 1)}
    place = "c.bin: token 0 is id 600" if name == "ids_at_opening" else "the data contains token id 600"
    assert f"{place}, but the model's vocabulary has 512 rows" in said[0] + said[1]
    assert "Traceback" not in said[0] + said[1]
    assert not list((runs / name).glob("checkpoint-*")) and not (runs / name / ".run.lock").exists()
