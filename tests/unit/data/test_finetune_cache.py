"""The cache of tokenized examples: its content, when it is rebuilt and by whom; and `oarlock data check`."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from oarlock.cli.main import main
from oarlock.config.finetune import FinetuneDataSection
from oarlock.data.embedded.tokenizer import ASSISTANT, EOS, USER
from oarlock.data.examples import dataset
from oarlock.data.examples.dataset import load_finetune_data
from oarlock.data.examples.encode import ENCODING_VERSION, Counts, Row
from oarlock.data.examples.example_cache import ExampleWriter, StoredExamples, StoredPrompts, is_complete
from oarlock.data.examples.labels import IGNORE_INDEX, Encoded, EvalPrompt
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.environment import signals
from oarlock.errors import DataError
from oarlock.files import compute_sha256, compute_sha256_cached
from oarlock.formats.sealed import seal_text
from oarlock.train.stop_signals import StopRequest


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(str(tiny_tokenizer))


@pytest.fixture
def data(tmp_path) -> FinetuneDataSection:
    lines = [json.dumps({"src": f"question {i}", "tgt": f"answer {i}"}) for i in range(20)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines[:15]))
    (tmp_path / "data" / "dev.jsonl").write_text("\n".join(lines[15:]))
    return FinetuneDataSection(dataset_name_or_path=str(tmp_path / "data"), data_cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The splits in the order in which they are tokenized."""
    sides: list[str] = []
    really = dataset._write_examples
    monkeypatch.setattr(
        dataset, "_write_examples", lambda folder, side, *rest: (sides.append(side), really(folder, side, *rest))
    )
    return sides


def test_sigterm_during_tokenization_leaves_nothing(data, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(signals, "_terminated", False)
    stop, really = StopRequest(), dataset.encode_source

    def interrupted(*args):
        stop._handle(signal.SIGTERM, None)
        return really(*args)

    monkeypatch.setattr(dataset, "encode_source", interrupted)
    with pytest.raises(SystemExit) as exit_:
        load_finetune_data(data, tokenizer)
    assert exit_.value.code == 128 + signal.SIGTERM
    assert "SIGTERM: stopping" in capsys.readouterr().out
    assert [path for path in Path(data.data_cache_dir).rglob("*") if path.is_file() and path.suffix != ".lock"] == []


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.tuples(st.booleans(), st.integers(1, 5)), min_size=1, max_size=5), st.booleans()),
        min_size=1,
        max_size=8,
    )
)
def test_cached_examples_read_back_unchanged(tmp_path_factory, shapes):
    folder = tmp_path_factory.mktemp("examples") / "key"
    rows, expected = [], []
    for number, (stretches, cut) in enumerate(shapes):
        flags = [trained for trained, length in stretches for _ in range(length)]
        ids = [100 * number + i for i in range(len(flags))]
        runs = [0]
        for flag in flags:
            runs += [0] if flag != (len(runs) % 2 == 0) else []
            runs[-1] += 1
        prompt = EvalPrompt(ids[:1], f"é{number}", "a") if number % 3 else None
        rows.append(Row(Encoded(ids, runs, number, 2 * number, cut), 7 * number, prompt))
        expected.append((ids[:-1], [i if f else IGNORE_INDEX for i, f in zip(ids[1:], flags[1:], strict=True)], cut))
    with ExampleWriter(folder, vocab_size=70_000) as writer:
        for part in (rows[:3], [], rows[3:]):
            writer.begin_source()
            writer.add(part)
        assert not folder.exists()
        writer.finish(Counts(records=len(rows), first_bad=["x:1"]))
    examples = pickle.loads(pickle.dumps(StoredExamples(folder, ("a", "empty", "b"))))
    assert [(e.input_ids, e.labels, e.truncated) for e in examples] == expected
    assert examples[-1] == examples[len(rows) - 1] and examples[1:3] == [
        examples[i] for i in range(1, min(3, len(rows)))
    ]
    assert examples.lengths.tolist() == [len(ids) for ids, _, _ in expected]
    assert [examples.locate(i) for i in range(len(rows))] == [
        f"{'a' if i < 3 else 'b'}:{7 * i}" for i in range(len(rows))
    ]
    assert list(StoredPrompts(examples)) == [row.prompt for row in rows if row.prompt]
    assert examples.counts == Counts(records=len(rows), first_bad=["x:1"])


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), ExampleWriter(tmp_path / "key", 10) as writer:
        writer.add([Row(Encoded([1, 2], [0, 2], 0, 2, False), 1)])
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_examples_are_tokenized_again_only_after_a_change(data, tokenizer, made, tmp_path):
    first = load_finetune_data(data, tokenizer)
    assert made == ["train", "dev"]
    again = load_finetune_data(data, tokenizer)
    assert made == ["train", "dev"] and again.fingerprint == first.fingerprint and again.train[3] == first.train[3]
    moved = shutil.copytree(tmp_path / "data", tmp_path / "moved")
    load_finetune_data(dataclasses.replace(data, dataset_name_or_path=str(moved)), tokenizer)
    assert made == ["train", "dev"], "the content counts, not the place"

    seen = {first.fingerprint}
    changes = [
        {"src_length": 5},
        {"tgt_length": 5},
        {"chat_template": "plain"},
        {"data_format": "src_tgt"},
    ]
    for change in changes:
        made.clear()
        seen.add(load_finetune_data(dataclasses.replace(data, **change), tokenizer).fingerprint)
        assert made == ["train", "dev"], change
    train = tmp_path / "data" / "train.jsonl"
    train.write_text(train.read_text().replace("answer 3", "answer X"))
    made.clear()
    seen.add(load_finetune_data(data, tokenizer).fingerprint)
    assert made == ["train"] and len(seen) == len(changes) + 2


def test_a_skip_bad_cache_is_shared_only_without_bad_records(data, tokenizer, made, tmp_path):
    skipping = dataclasses.replace(data, skip_bad=True)
    key = load_finetune_data(skipping, tokenizer).fingerprint
    assert load_finetune_data(data, tokenizer).fingerprint == key and made == ["train", "dev"]
    train = tmp_path / "data" / "train.jsonl"
    train.write_text(train.read_text() + '\n{"src": "q"}')
    assert len(load_finetune_data(skipping, tokenizer).train) == 15
    for _ in range(2):
        with pytest.raises(DataError, match=r"train.jsonl:16: field 'tgt' is missing"):
            load_finetune_data(data, tokenizer)
    made.clear()
    assert len(load_finetune_data(skipping, tokenizer).train) == 15 and made == [], "and it is still there"


def test_another_tokenizer_gets_its_own_cache(data, tokenizer, tiny_tokenizer, tmp_path):
    folder = shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    other = load_finetune_data(data, load_tokenizer(str(folder)))
    assert other.fingerprint != load_finetune_data(data, tokenizer).fingerprint


def test_a_damaged_cache_is_rebuilt(data, tokenizer, made, tmp_path):
    key = load_finetune_data(data, tokenizer).fingerprint
    tokens = tmp_path / "cache" / key / "tokens.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-2])
    assert not is_complete(tokens.parent)
    assert load_finetune_data(data, tokenizer).fingerprint == key
    assert made == ["train", "dev", "train"] and tokens.read_bytes() == whole


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "|O"},
        {"dtype": "<f4"},
        {"num_examples": "2"},
        {"counts": {"records": -1.5}},
        {"bytes": {}},
        {"bytes": None},
    ],
)
def test_caches_with_foreign_notes_are_not_used(tmp_path, change):
    with ExampleWriter(tmp_path / "x", 100) as writer:
        writer.begin_source()
        writer.finish(Counts())
    about = tmp_path / "x" / "about.json"
    assert is_complete(tmp_path / "x")
    noted = json.loads(about.read_text())
    del noted["sha256"]
    about.write_text(seal_text(noted | change))
    assert not is_complete(tmp_path / "x")
    with pytest.raises(DataError, match=r"about.json|damaged or incomplete"):
        StoredExamples(tmp_path / "x")
    about.unlink()
    os.mkfifo(about)
    assert not is_complete(tmp_path / "x")


def test_ids_match_the_encoding_version(data, tokenizer, tmp_path):
    """If this changes for the same tokenizer and records, raise ENCODING_VERSION: caches hold the old ids."""
    folder = tmp_path / "cache" / load_finetune_data(data, tokenizer).fingerprint
    stored = [compute_sha256(folder / name)[:8] for name in ("tokens.bin", "runs.bin", "rows.bin")]
    assert (ENCODING_VERSION, stored) == (2, ["18b38779", "1f322736", "f0333e52"])


def test_a_read_only_data_folder_works_and_a_read_only_cache_is_named(data, tokenizer, tmp_path):
    load_finetune_data(data, tokenizer)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["dev.jsonl", "train.jsonl"]
    (tmp_path / "file").write_text("")
    wrong = dataclasses.replace(data, data_cache_dir=str(tmp_path / "file" / "cache"), src_length=7)
    with pytest.raises(
        DataError, match=r"file/cache: tokenised data can't be stored here \(.*\); choose another --data_cache_dir"
    ):
        load_finetune_data(wrong, tokenizer)


def test_hashes_are_noted_until_a_file_changes(tmp_path, monkeypatch):
    file, taken = tmp_path / "file", []
    monkeypatch.setattr("oarlock.files.compute_sha256", lambda path: (taken.append(path), compute_sha256(path))[1])
    file.write_text("one")
    for _ in range(2):  # just written: not recorded
        assert compute_sha256_cached(file, tmp_path / "notes") == compute_sha256(file)
    assert len(taken) == 2
    monkeypatch.setattr("oarlock.files.time.time_ns", lambda: file.stat().st_ctime_ns + 3_000_000_000)
    for _ in range(3):
        assert compute_sha256_cached(file, tmp_path / "notes") == compute_sha256(file)
    assert len(taken) == 3
    times = file.stat()
    file.write_text("two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size and modification time
    assert compute_sha256_cached(file, tmp_path / "notes") == compute_sha256(file)


# several ranks (tests/rehearsal/test_loading.py has real ones)


def test_nodes_with_different_data_are_detected(data, tokenizer, monkeypatch):
    monkeypatch.setattr(dataset, "run_once_per_node", lambda action: (found := action(), [found, {"train": "other"}]))
    with pytest.raises(DataError, match="nodes have different data"):
        load_finetune_data(data, tokenizer)


# oarlock data show and check


def test_show_colours_trained_tokens_and_skips_wrong_records(tiny_tokenizer, tmp_path, capsys):
    lines = ['{"src": "q", "tgt": "a"}', '{"src": "q"}', '{"src": "r", "tgt": "b"}', '{"src": "s", "tgt": "c"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(SystemExit) as stopped:
        words = ["--tokenizer", str(tiny_tokenizer), "--num", "2", "--color", "always"]
        main(["data", "show", str(tmp_path / "a.jsonl"), *words])
    output = capsys.readouterr().out
    assert stopped.value.code == 0 and "1 bad records skipped" in output
    for line, question, answer in ((1, "q", "a"), (3, "r", "b")):
        shown = f"\x1b[2m{USER}{question}{ASSISTANT}\x1b[0m\x1b[32m{answer}{EOS}\x1b[0m"
        assert f"a.jsonl:{line}: 5 tokens, 2 trained on\n{shown}\n" in output
    assert output.count("--- example") == 2


def test_check_reports_the_problems_of_a_run(tiny_tokenizer, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    long = {"src": "many words " * 30, "tgt": "a"}
    unweighted = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}
    train = [{"src": "a", "tgt": "b"}, long, {"src": "c", "tgt": "d"}, {"src": "a", "tgt": "b"}, {"src": "only"}]
    (folder / "train-1.jsonl").write_text("\n".join(map(json.dumps, train)))
    (folder / "train-2.jsonl").write_text(json.dumps(unweighted))
    (folder / "dev.jsonl").write_text(json.dumps({"src": "c", "tgt": "d"}))
    picture = tmp_path / "lengths.png"
    words = ["--tokenizer", str(tiny_tokenizer), "--src-length", "20", "--data-cache-dir", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as stopped:
        main(["data", "check", str(folder), *words, "--histogram", str(picture)])
    output = capsys.readouterr().out
    assert stopped.value.code == 1
    for expected in (
        "train: 5 records, 4 examples",
        f"longest example          {folder}/train-1.jsonl:2",
        "truncated                1 (20.0%)",
        f"nothing to train on      1\n    {folder}/train-2.jsonl:1",
        f"wrong records            1\n    {folder}/train-1.jsonl:5: field 'tgt' is missing, expected a string",
        f"train: 1 examples repeat an earlier one, token for token\n    {folder}/train-1.jsonl:4 repeats {folder}/train-1.jsonl:1",
        f"dev: 1 examples are also in train\n    {folder}/dev.jsonl:1",
    ):
        assert expected in output, output
    with Image.open(picture) as image:
        assert image.size == (1080, 432) and len(image.getcolors(1 << 20)) > 10


def test_check_accepts_valid_data_and_names_wrong_flags(data, tiny_tokenizer, tmp_path, capsys):
    words = [data.dataset_name_or_path, "--tokenizer", str(tiny_tokenizer), "--data-cache-dir", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as stopped:
        main(["data", "check", *words])
    assert stopped.value.code == 0 and "wrong records            0" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["data", "check", *words, "--histogram", str(Path("a.bmp"))])
    assert stopped.value.code == 2 and "supported formats are .svg, .png, .pdf" in capsys.readouterr().err
