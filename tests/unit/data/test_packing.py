"""Packs hold every example once, none is too long, and packing is deterministic; and the arrays of packed rows."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.config import FinetuneConfig, load_config
from oarlock.data.examples.collate import FinetuneCollator, PackCollator
from oarlock.data.examples.dataset import ExampleDataset
from oarlock.data.examples.labels import IGNORE_INDEX, Example
from oarlock.data.examples.packing import PackedDataset, make_packs, measure_padded_fill
from oarlock.errors import ConfigError, DataError
from oarlock.models.packing import ENDS, adapt_attention_mask, check_packing
from oarlock.ops.attention_backends import masks
from oarlock.ops.attention_backends.masks import dense_mask, split_row
from oarlock.train.finetune import _pack


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The space left in each pack after each item, by the textbook algorithm."""
    rooms: list[int] = []
    for length in sorted((min(length, capacity) for length in lengths), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return sorted(rooms)


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=80), capacity=st.integers(1, 50), seed=st.integers(0, 3))
def test_packs_hold_every_example_once_as_by_best_fit_decreasing(lengths, capacity, seed):
    array = np.asarray(lengths, np.int64)
    packs = make_packs(array, capacity, seed)
    held = [packs[i].tolist() for i in range(len(packs))]
    assert sorted(index for pack in held for index in pack) == list(range(len(lengths)))
    for pack in held:
        assert pack and (len(pack) == 1 or sum(lengths[index] for index in pack) <= capacity)
    rooms = sorted(max(0, capacity - sum(lengths[index] for index in pack)) for pack in held)
    assert rooms == best_fit_decreasing(lengths, capacity)
    again = make_packs(array.copy(), capacity, seed)
    assert (again.members == packs.members).all() and (again.offsets == packs.offsets).all()


def test_packs_do_not_change_between_versions():
    packs = make_packs(np.asarray([3, 9, 2, 2, 5, 12, 4, 4, 1, 2]), 10, seed=7)
    assert [packs[i].tolist() for i in range(len(packs))] == PINNED
    assert make_packs(np.full(100, 4), 8, 1).members.tolist() != make_packs(np.full(100, 4), 8, 2).members.tolist()


PINNED = [[5], [1, 8], [4, 7], [0, 2, 6], [3, 9]]


def test_a_million_lengths_are_packed_almost_full():
    lengths = np.clip(np.random.RandomState(0).lognormal(4.5, 0.8, 300_000), 8, 512).astype(np.int64)
    packs = make_packs(lengths, 512, 0)
    assert lengths.sum() / (len(packs) * 512) > 0.99 > 2 * measure_padded_fill(lengths, 8, 0)


def make_example(first: int, length: int) -> Example:
    ids = list(range(first, first + length))
    return Example(ids, [IGNORE_INDEX] * (length - 1) + [ids[-1] + 1], False)


def test_packed_rows_restart_positions_and_mark_where_examples_end():
    packs = [(make_example(1, 3), make_example(10, 2)), (make_example(20, 4),)]
    batch = PackCollator(100, 0, multiple_of=6)(packs)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 10, 11, 0], [20, 21, 22, 23, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 4, -100, 12, -100], [-100, -100, -100, 24, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert batch[ENDS].tolist() == [[3, 3, 3, 5, 5, 6], [4, 4, 4, 4, 5, 6]]
    assert batch[ENDS].dtype == np.int32 and batch["num_tokens"].tolist() == [5, 4]
    seen = dense_mask(*[batch[ENDS].shape[1]] * 2, paddle.to_tensor(batch[ENDS])).numpy()
    blocks = np.zeros([6, 6], bool)
    for start, stop in ((0, 3), (3, 5), (5, 6)):
        blocks[start:stop, start:stop] = np.tri(stop - start, dtype=bool)
    assert (seen[0] == blocks).all()
    assert seen.any(axis=2).all()  # a row that attends to nothing is NaN in some kernels


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_rows_are_cut_between_examples(lengths):
    stops = np.cumsum(lengths)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(masks, "_BLOCK", 20)
        pieces = split_row(np.repeat(stops, lengths).astype(np.int32))
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])] and pieces[-1][1] == stops[-1]
    assert {stop for _, stop in pieces} <= set(stops.tolist())
    sizes = [stop - start for start, stop in pieces]
    assert all(size <= 20 or size in lengths for size in sizes)
    assert all(a + b > 20 for a, b in pairwise(sizes))  # short ones were joined


@pytest.mark.parametrize(
    ("family", "flash", "dense"), [("llama", True, False), ("llama", False, True), ("gemma", True, True)]
)
def test_models_get_the_mask_format_of_their_attention(family, flash, dense):
    model = SimpleNamespace(config=FakeConfig(model_type=family, use_flash_attention=flash))
    inputs = {"input_ids": 1, ENDS: paddle.ones([1, 2], dtype="int32")}
    assert (adapt_attention_mask(inputs, model) is inputs) is not dense
    assert ("attention_mask" in adapt_attention_mask(inputs, model)) is dense
    assert adapt_attention_mask({"input_ids": 1}, model) == {"input_ids": 1}


def test_evaluation_batches_are_not_packed():
    examples = [make_example(1, 3), make_example(5, 2)]
    packing, plain = (collator(100, 0)(examples) for collator in (PackCollator, FinetuneCollator))
    assert packing.keys() == plain.keys() and all((packing[name] == plain[name]).all() for name in plain)


def test_the_log_line_and_the_default_length():
    dataset = PackedDataset(ExampleDataset([make_example(1, n) for n in (10, 5, 5, 4, 3, 3)]), None, seed=0)
    assert dataset.capacity == 10 and len(dataset) == 3
    assert sorted(len(pack) for pack in (dataset[i] for i in range(3))) == [1, 2, 3]
    assert dataset.describe() == (
        "packing: 6 examples in 3 packs of 10 tokens, 2.0 per pack, 100.0% full (padded batches of 8: 50.0%); samples, "
        "steps and epochs count packs"
    )
    shorter = PackedDataset(dataset.examples, 6, seed=0)
    assert "5 packs of 6 tokens, 1.2 per pack, 60.0% full" in shorter.describe()  # 10 | 5 | 5 | 4 | 3 + 3
    with pytest.raises(DataError, match="no example"):
        PackedDataset(ExampleDataset([]), None, seed=0)


@pytest.mark.parametrize(
    ("lengths", "packs"),
    [
        ([12] * 200 + [20] * 8, None),  # no two fit
        ([9] * 3 + [12] * 200 + [20] * 8, None),  # some do, but rows of 12 in 20 waste more than padded ones
        ([5] * 100 + [20] * 8, 33),
    ],
)
def test_nothing_is_packed_without_a_gain(lengths, packs, capsys):
    config = load_config(FinetuneConfig, ["--do_train", "--packing"]).config
    examples = ExampleDataset([make_example(1, length) for length in lengths])
    rows = _pack(config, examples)
    said = capsys.readouterr().out
    if packs is None:
        assert rows is examples and "a larger --packing_length may pack better" in said
    else:
        assert len(rows) == packs and "full (padded batches of 8: " in said


# cases that can't be packed


class FakeConfig:
    model_type = "llama"

    def __init__(self, **values) -> None:
        self.__dict__.update(values)


@pytest.mark.parametrize(
    ("values", "pipeline", "expected"),
    [
        *(
            ({"model_type": name}, False, f"PaddleNLP's {name} does not take")
            for name in ("opt", "bloom", "gptj", "glm")
        ),
        ({"alibi": True}, False, "ALiBi"),
        ({"model_type": "gemma"}, True, "--pipeline_parallel_degree 1"),
    ],
)
def test_models_that_mix_packed_examples_are_refused(values, pipeline, expected):
    with pytest.raises(ConfigError, match=expected):
        check_packing(FakeConfig(**values), pipeline)


def test_an_environment_that_drops_masks_is_refused(monkeypatch):
    check_packing(FakeConfig(), pipeline=True)
    monkeypatch.setenv("USE_CASUAL_MASK", "True")
    with pytest.raises(ConfigError, match="unset it"):
        check_packing(FakeConfig())


def test_packing_options():
    words = ["--do_train", "--src_length", "20", "--tgt_length", "30"]
    assert load_config(FinetuneConfig, [*words, "--zero_padding"]).config.data.packing
    lengths = [
        load_config(FinetuneConfig, [*words, *more]).config.sequence_length
        for more in (
            [],
            ["--packing"],
            ["--packing", "--packing_length", "64"],
            ["--packing", "--packing_length", "40"],
        )
    ]
    assert lengths == [50, 50, 64, 50]
    with pytest.raises(ConfigError, match="--packing_length 64 needs --packing"):
        load_config(FinetuneConfig, [*words, "--packing_length", "64"])
    for method in ("--prefix_tuning", "--p_tuning"):
        with pytest.raises(ConfigError, match=f"--packing can't be combined with {method}"):
            load_config(FinetuneConfig, [*words, "--packing", method])
