"""Several data sets: names, weights, held-out examples."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.config import FinetuneConfig, PretrainConfig, load_config
from oarlock.data.corpus.blend import ConcatenatedDataset, blend, make_short_names, parse_blend
from oarlock.data.corpus.sampler import EvaluationBatchSampler
from oarlock.data.examples.dataset import load_finetune_data
from oarlock.data.examples.inspect import check_data
from oarlock.data.records.columns import Columns
from oarlock.data.records.validation_split import hold_out
from oarlock.errors import ConfigError, DataError
from support.finetune_files import section, write


def records(first: int, count: int) -> list[dict]:
    return [{"src": f"question {i}", "tgt": f"answer {i}"} for i in range(first, first + count)]


# names and weights


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("a", [(1.0, "a")]),
        ("0.7 a 0.3 b", [(0.7, "a"), (0.3, "b")]),
        ("2 'a b' 1 c:d", [(2.0, "a b"), (1.0, "c:d")]),
        ("all a all 'it''s'", [(None, "a"), (None, "its")]),
        ("it's", [(1.0, "it's")]),
        ("1 there 2", [(1.0, "1 there 2")]),
    ],
)
def test_blends(text, pairs):
    assert parse_blend(text, "--x", lambda name: name == "1 there 2") == pairs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b c", "does not exist and is not a blend"),
        ("my data", "does not exist and is not a blend"),
        ("1 a x b", "weight 'x' of b"),
        ("0 a 1 b", "above 0"),
        ("all a 1 b", "each of them `all`"),
    ],
)
def test_wrong_blends(text, message):
    with pytest.raises(DataError, match=message):
        parse_blend(text, "--x", lambda name: False)


def test_lists_and_mappings_in_yaml_are_the_same_blend(tmp_path):
    lines = {
        "\n  - 0.7 data/a b\n  - 0.3 c": "0.7 'data/a b' 0.3 c",
        "\n  - data/a b\n  - c:d": "all 'data/a b' all c:d",
        "\n  data/a b: 2\n  c: 1": "2 'data/a b' 1 c",
        "\n  - {path: 2 files, weight: 3}\n  - {path: c}": "3 '2 files' all c",
    }
    for config, name in ((FinetuneConfig, "dataset_name_or_path"), (PretrainConfig, "input_dir")):
        for text, expected in lines.items():
            path = tmp_path / "c.yaml"
            path.write_text(
                f"data:\n  {name}:{text.replace(chr(10), chr(10) + '  ')}\nevaluation: {{do_train: true}}\n"
            )
            loaded = load_config(config, [str(path), "--output_dir", str(tmp_path / "o")]).config
            assert getattr(loaded.data, name) == expected
    path.write_text("data:\n  columns: {prompt: q, response: 'a, b'}\nevaluation: {do_train: true}\n")
    loaded = load_config(FinetuneConfig, [str(path), "--output_dir", str(tmp_path / "o")]).config
    assert Columns.parse(loaded.data.columns).column_of == {"src": ("q", False), "tgt": ("a, b", False)}
    path.write_text("data:\n  dataset_name_or_path: [[a, b]]\nevaluation: {do_train: true}\n")
    with pytest.raises(ConfigError, match="an element must be a path, 'weight path', or"):
        load_config(FinetuneConfig, [str(path), "--output_dir", str(tmp_path / "o")])


def test_short_names_are_unique():
    assert make_short_names(["x/a", "y/b"]) == ["a", "b"]
    assert make_short_names(["x/a", "y/a"]) == ["x/a", "y/a"]
    assert make_short_names(["a", "x/a"]) == ["a", "x/a"]
    assert make_short_names(["a", "a"]) == ["a#1", "a#2"]


def test_shares_are_reported_and_kept(capsys):
    sets = [[f"a{i}" for i in range(30)], [f"b{i}" for i in range(10)]]
    mixed, order = blend(sets, ["a", "b"], [1.0, 1.0], seed=1)
    assert "50.0% a (30 samples, 0.67 times per epoch)" in capsys.readouterr().out
    epoch = [mixed[order[i]] for i in range(order.num_samples)]
    assert len(epoch) == 40 and Counter(name[0] for name in epoch) == {"a": 20, "b": 20}
    assert Counter(name for name in epoch if name[0] == "b") == {f"b{i}": 2 for i in range(10)}
    assert [mixed[order[i]] for i in range(17, 25)] == epoch[17:25], "a position is a sample, whatever came before"
    whole, order = blend(sets, ["a", "b"], [None, None], seed=1)
    assert sorted(whole[order[i]] for i in range(40)) == sorted(sets[0] + sets[1])
    alone, order = blend(sets[:1], ["a"], [0.3], seed=1)
    assert alone is sets[0] and order.num_samples == 30


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    batch=st.integers(1, 5),
    replicas=st.integers(1, 3),
    limit=st.sampled_from([-1, 1, 2]),
)
def test_evaluation_batches_hold_a_single_set(sizes, batch, replicas, limit):
    samplers = [EvaluationBatchSampler(sizes, batch, replicas, r, limit) for r in range(replicas)]
    ends = list(itertools.accumulate(sizes))
    counted: list[int] = []
    for sampler in samplers:
        batches = list(sampler)
        assert len(batches) == len(sampler) == len(samplers[0])
        for t, indices in enumerate(batches):
            part = sampler.find_dataset(t)
            assert part == samplers[0].find_dataset(t) and all(
                ends[part] - sizes[part] <= i < ends[part] for i in indices
            )
            counted += indices[: sampler.count_real(t)]
    per_set = [min(size, limit * batch * replicas) if limit > 0 else size for size in sizes]
    assert sorted(counted) == [
        end - size + i for end, size, n in zip(ends, sizes, per_set, strict=True) for i in range(n)
    ]


def test_sets_are_loaded_by_name(tmp_path, tokenizer):
    a = write(tmp_path / "a set" / "train.jsonl", records(0, 12)).parent
    write(a / "dev.jsonl", records(100, 3))
    b = write(tmp_path / "b.jsonl", records(50, 6))
    data = load_finetune_data(section(tmp_path, f"3 '{a}' 1 {b}", validation_split=0.5), tokenizer)
    assert [(part.name, part.weight, len(part.train), len(part.dev)) for part in data.sets] == [
        ("a set", 3.0, 12, 3),
        ("b.jsonl", 1.0, 3, 3),
    ]
    assert isinstance(data.dev, ConcatenatedDataset)
    assert data.dev.names == ["a set", "b.jsonl"] and data.dev.shares == [0.75, 0.25] and len(data.dev_prompts) == 6
    assert [prompt.answer for prompt in data.dev_prompts[:3]] == [f"answer {i}" for i in (100, 101, 102)]
    alone = load_finetune_data(section(tmp_path, b, validation_split=0.5), tokenizer)
    held = [alone.dev.examples.locate(i) for i in range(3)]
    assert held == [data.sets[1].dev.examples.locate(i) for i in range(3)]
    assert len({data.fingerprint, alone.fingerprint}) == 2
    write(tmp_path / "bad.jsonl", [{"src": 1, "tgt": "x"}])
    with pytest.raises(DataError, match=r"bad.jsonl:1: field 'src' holds int"):
        load_finetune_data(section(tmp_path, f"1 '{a}' 1 {tmp_path}/bad.jsonl"), tokenizer)


# held out


def test_held_out_examples_are_never_trained_on_and_always_the_same(tmp_path, tokenizer):
    rows = records(0, 90) + records(0, 30)  # thirty occur twice
    path = write(tmp_path / "a.jsonl", rows)
    for amount, wanted in ((0.1, 12), (20, 20)):
        data = load_finetune_data(section(tmp_path, path, validation_split=amount), tokenizer)
        train, dev = ({tuple(one.input_ids) for one in side.examples} for side in (data.train, data.dev))
        assert not train & dev and len(train | dev) == 90
        assert len(data.train) + len(data.dev) == 120 and wanted <= len(data.dev) <= wanted + 1
        assert [prompt.answer for prompt in data.dev_prompts] == [
            rows[int(data.dev.examples.locate(i).rsplit(":", 1)[1]) - 1]["tgt"] for i in range(len(data.dev))
        ]
        assert data.dev.lengths.tolist() == [len(one.input_ids) for one in data.dev.examples]
    stored = data.train.examples.examples
    same = [hold_out(stored, 20, seed, "x")[1].tolist() for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]
    only_evaluated = load_finetune_data(section(tmp_path, path, validation_split=20), tokenizer, need_train=False)
    assert only_evaluated.dev[0] == data.dev[0] and len(only_evaluated.dev) == len(data.dev)


def test_adding_records_moves_few_between_train_and_dev(tmp_path, tokenizer):
    held = []
    for count in (100, 110):
        path = write(tmp_path / f"{count}.jsonl", records(0, count))
        data = load_finetune_data(section(tmp_path, path, validation_split=0.2), tokenizer)
        held.append({prompt.answer for prompt in data.dev_prompts})
    assert len(held[0] & held[1]) >= 15


def test_a_dev_file_takes_precedence_over_a_split(tmp_path, tokenizer, capsys):
    write(tmp_path / "d" / "train.jsonl", records(0, 10))
    write(tmp_path / "d" / "dev.jsonl", records(10, 2))
    data = load_finetune_data(section(tmp_path, tmp_path / "d", validation_split=0.5), tokenizer)
    assert (len(data.train), len(data.dev)) == (10, 2)
    assert f"--validation_split 0.5 is not used: there is a dev file, {tmp_path}/d/dev.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("amount", [4, 5, 0.99])
def test_an_empty_split_is_refused(tmp_path, tokenizer, amount):
    path = write(tmp_path / "a.jsonl", records(0, 4))
    with pytest.raises(DataError, match="leaves nothing to train on"):
        load_finetune_data(section(tmp_path, path, validation_split=amount), tokenizer)
    path = write(tmp_path / "b.jsonl", records(0, 1) * 4)
    with pytest.raises(DataError, match="all 4 examples are identical"):
        load_finetune_data(section(tmp_path, path, validation_split=1), tokenizer)


def test_splits_that_are_neither_share_nor_count_are_refused():
    for value, message in (("1.5", "a share below 1, or a whole number"), ("0", "more than 0"), ("-1", "more than 0")):
        with pytest.raises(ConfigError, match=message):
            load_config(FinetuneConfig, ["--do_train", "--output_dir", "o", "--validation_split", value])


# plain text, and the commands


@settings(max_examples=20, deadline=None)
@given(block=st.integers(600, 3000), size=st.integers(1, 12_000))
def test_pieces_of_a_long_text_give_the_ids_of_the_full_text(tmp_path_factory, tokenizer, block, size):
    from oarlock.data.corpus import text_chunks
    from oarlock.data.files import byte_streams

    tmp_path = tmp_path_factory.mktemp("t")
    text = ("word 123 (a), b\n\n  c" * 1000)[:size]
    (tmp_path / "a.txt").write_text(text)
    write(tmp_path / "a.jsonl", [{"text": text}])
    lengths = {"src_length": 100, "tgt_length": 28}
    whole = load_finetune_data(section(tmp_path, tmp_path / "a.jsonl", **lengths), tokenizer).train.examples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_streams, "BLOCK_BYTES", block)
        patch.setattr(text_chunks, "CHUNK_LENGTH", 600)
        parts = load_finetune_data(section(tmp_path, tmp_path / "a.txt", **lengths), tokenizer).train.examples
    assert list(parts) == list(whole)


def test_check_reports_each_set_and_the_skipped_records(tmp_path, tiny_tokenizer, capsys):
    write(tmp_path / "a" / "x.jsonl", records(0, 2))
    (tmp_path / "a" / "y.xlsx").write_text("")
    b = write(tmp_path / "b.jsonl", [{"q": "1", "a": "2"}])
    both = section(tmp_path, f"1 {tmp_path}/a 1 {b}", columns="prompt=src,response=tgt", skip_bad=True)
    with pytest.raises(DataError, match=r"b.jsonl: no usable record \(1 bad ones, .*no column 'src'"):
        check_data(both, str(tiny_tokenizer), None)
    found = dataclasses.replace(both, dataset_name_or_path=f"1 {tmp_path}/a 1 {tmp_path}/a/x.jsonl")
    assert check_data(found, str(tiny_tokenizer), None) == 0
    said = capsys.readouterr().out
    assert "=== a\n" in said and "=== x.jsonl\n" in said and "y.xlsx: the ending .xlsx; supported are" in said
