"""Marks that select what is trained."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.data.records.conversations import parse_record
from oarlock.errors import DataError
from support.records import read

# marks


@pytest.mark.parametrize("name", ["weight", "train", "loss", "train_on_turn", "loss_mask", "training", "loss_weight"])
@pytest.mark.parametrize(
    ("no", "yes"), [(0, 1), (0.0, 1.0), (False, True), ("0", "1"), ("false", "TRUE"), ("no", "yes")]
)
def test_marks_of_turns_are_honoured(tokenizer, name, no, yes):
    rounds = [
        *({"role": "user", "content": "q"}, {"role": "assistant", "content": "WRONG", name: no}),
        *({"role": "user", "content": "r", name: None}, {"role": "assistant", "content": "right", name: yes}),
    ]
    (shown,), _ = read([{"messages": rounds}], tokenizer)
    assert "WRONG" in shown and "⟦WRONG" not in shown and "right<|im_end|>⟧" in shown


@pytest.mark.parametrize(
    ("marks", "trained"),
    [
        ({"loss_mask": [0, 1, 0, 0]}, ["one"]),
        ({"train_on_turn": [False, True]}, ["two"]),
        ({"weight": "1"}, ["one", "two"]),
        ({"train": False}, []),
        ({"loss": None}, ["one", "two"]),
    ],
)
def test_marks_of_records_are_honoured(tokenizer, marks, trained):
    rounds = [
        *({"role": "user", "content": "q"}, {"role": "assistant", "content": "one"}),
        *({"role": "user", "content": "r"}, {"role": "assistant", "content": "two"}),
    ]
    shown, counts = read([{"messages": rounds, **marks}], tokenizer)
    found = [word for word in ("one", "two") if any(f"{word}<|im_end|>⟧" in text for text in shown)]
    assert found == trained and counts.untrained == (not trained)
    if not any(isinstance(value, list) for value in marks.values()):
        shown, counts = read([{"src": ["q", "r"], "tgt": ["one", "two"], **marks}], tokenizer)
        assert bool(shown) == bool(trained) and counts.untrained == (not trained)


@pytest.mark.parametrize(
    ("message", "record", "expected"),
    [
        ({"weight": 0.5}, {}, "field 'messages[1].weight' is 0.5; an answer is trained on (1, true) or not"),
        ({"train": "maybe"}, {}, "field 'messages[1].train' is 'maybe'"),
        ({"loss": {"a": 1}}, {}, "field 'messages[1].loss' is {'a': 1}"),
        ({"train": True, "weight": 0}, {}, "contradicts another mark of the same message"),
        ({"train_detail": [{"begin": 0}]}, {}, "field 'messages[1].train_detail' marks parts of an answer"),
        ({}, {"weight": 2}, "field 'weight' is 2"),
        ({}, {"loss_mask": [1, 0, 1]}, "field 'loss_mask' has 3 values for 2 messages, of which 1 are answers"),
        ({}, {"loss_mask": [1, 1]}, "message 0 of 'messages' is marked to be trained on"),
        ({"weight": 1}, {"train": False}, "field 'train' contradicts another mark"),
    ],
)  # fmt: skip
def test_marks_that_cannot_be_honoured_are_refused(tokenizer, message, record, expected):
    rounds = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **message}]
    with pytest.raises(DataError) as error:
        read([{"messages": rounds, **record}], tokenizer)
    assert str(error.value).startswith("data:1: ") and expected in str(error.value)


@settings(max_examples=40, deadline=None)
@given(marks=st.lists(st.sampled_from([None, 0, 1, "false", "true", 0.0, True]), min_size=1, max_size=5))
def test_all_answers_are_trained_unless_marked(marks):
    rounds = []
    for i, mark in enumerate(marks):
        rounds += [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{i}", "train": mark}]
    talk = parse_record({"messages": rounds}, "messages", "here:1")
    off = {2 * i + 1 for i, mark in enumerate(marks) if mark in (0, "false", 0.0) and mark is not None}
    assert talk.not_trained == off


def test_fields_that_look_like_marks_are_named_once_per_file(tokenizer):
    rounds = [{"role": "user", "content": "q", "mask": 1}, {"role": "assistant", "content": "a", "no_train": True}]
    records = [{"messages": rounds, "rejected": "b", "id": 7, "images": ["x.png"], "tools": []}] * 3
    _, counts = read(records, tokenizer)
    assert counts.unread == [f"data:1: field '{name}'" for name in ("rejected", "images", "mask", "no_train")]


@pytest.mark.parametrize(
    ("record", "unread"),
    [
        ({"messages": [{"role": "assistant", "content": "a"}], "conversations": [{"from": "gpt", "value": "b"}]}, ["messages"]),
        ({"question": "q", "answer": "a", "text": "### q ### a"}, ["text"]),
        ({"messages": [{"role": "assistant", "content": "a"}], "context": "c", "prompt": "q"}, ["context"]),
        ({"prompt": "q", "response": "a", "meta_instruction": "m", "category": "x"}, ["meta_instruction"]),
        ({"messages": [{"role": "assistant", "content": "a", "refusal": "no"}]}, ["refusal"]),
        ({"messages": [{"role": "assistant", "content": "a"}], "tools": [{"type": "function", "function": {"name": "f"}}]}, []),
    ],
)  # fmt: skip
def test_fields_of_another_record_form_are_named(tokenizer, record, unread):
    assert read([record], tokenizer)[1].unread == [f"data:1: field '{name}'" for name in unread]
