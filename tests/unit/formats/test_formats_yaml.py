"""Untrusted YAML: what is refused, with its line; everything else is read as by PyYAML."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from oarlock.errors import ConfigError, OarlockError
from oarlock.formats.yaml_file import Budget, compose_text, value_of

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=4),
    max_leaves=20,
)
TEXTS = st.text() | st.text(alphabet="ab:-? []{}&*!|>'\"\n\t#%@,~<=.0123456789T\\ux\0")


@given(VALUES)
def test_pyyaml_output_is_read_as_by_pyyaml(value):
    text = yaml.safe_dump(value, allow_unicode=True)
    node = compose_text(text, "x.yaml")
    assert node is not None
    assert value_of(node, "x.yaml") == yaml.safe_load(text)


@given(TEXTS)
def test_any_text_is_read_or_refused_in_one_sentence(text):
    try:
        node = compose_text(text, "x.yaml")
        value_of(node, "x.yaml") if node is not None else None
    except OarlockError as error:
        assert str(error).startswith("x.yaml:")
        assert "\n" not in str(error)


def nested(levels: int) -> str:
    inner = "&a0 [x, x, x, x, x, x, x, x, x, x]"
    for i in range(levels):
        inner = f"&a{i + 1} [{inner}" + f", *a{i}" * 9 + "]"
    return f"k: {inner}\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (nested(9), ":1: more than 20,000 values, with aliases expanded"),
        (
            "a: &m0 {k: v}\n" + "".join(f"a{i}: &m{i + 1} {{<<: [{f'*m{i}, ' * 10}]}}\n" for i in range(8)),
            "more than 20,000 values",
        ),
        ("a: &x\n  - *x\n", ":2: *x is used inside its own value"),
        ("a: *x\n", ":1: not valid YAML: found undefined alias"),
        ("b: 1\n[a, b]: 1\n", ":2: a key must be a string; this one is a list or a mapping"),
        ("b: {? {a: 1} : 2}\n", ":1: a key must be a string"),
        ("? \n: 1\n", ":1: a key must be a string; this one is empty"),
        ("a: 1\nb: {c: 1,\n c: 2}\n", ":3: c is already defined at line 2"),
        ("a: 1\nday: 2024-02-30\n", ":2: 2024-02-30 is a date that does not exist; quote it"),
        ("a: !!int abc\n", ":1: abc is not an integer"),
        ("a: !!float x\n", ":1: x is not a number"),
        ("a: !!bool x\n", ":1: x is neither true nor false"),
        ("a: !!python/object/apply:os.system [ls]\n", ":1: tag tag:yaml.org,2002:python/object/apply:os.system is not"),
        ("a: 1\nb: !!binary aGk=\n", ":2: tag tag:yaml.org,2002:binary is not one of YAML's core schema"),
        ("a: !!timestamp 2024-01-01\n", "core schema"),
        ("a: !!set {x, y}\n", "core schema"),
        ("a: !own x\n", "tag !own is not"),
        ("a: " + "9" * 5000, ":1: an integer of more than 40 digits"),
        ("a: 0x" + "f" * 5000, ":1: an integer of more than 40 digits"),
        ("a: " + "9:" * 50 + "9", ":1: an integer of more than 40 digits"),
        ("a: " + "[" * 3000 + "]" * 3000, ":1: lists and mappings more than 32 levels deep"),
        ("- " * 3000 + "x", ":1: lists and mappings more than 32 levels deep"),
        ("? " * 3000 + "x", ":1: lists and mappings more than 32 levels deep"),
        ("a: 1\n---\nb: 1\n", ":2: not valid YAML: a second document begins; a file may hold only one"),
        ('a: "x\\0y"\n', ":1: a value can't hold a NUL character"),
        ('a:\n  - "\\ud800"\n', ":2: a value contains a lone surrogate"),
        ("a: 1\nb: \0\n", ":2: not valid YAML: a character that is not allowed (U+0000)"),
        ("a: [1, 2\n", ":2: not valid YAML: while parsing a flow sequence, expected ',' or ']'"),
        ("- x\n" * 25_000, ": more than 20,000 values"),
    ],
)
def test_refusals_give_the_line(text, reason):
    with pytest.raises(ConfigError) as caught:
        node = compose_text(text, "x.yaml")
        value_of(node, "x.yaml") if node is not None else None
    assert str(caught.value).startswith("x.yaml:")
    assert reason.removeprefix(": ") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_valid_aliases_merges_and_dates():
    node = compose_text(
        "a: &m {x: 1, y: [2]}\nb: {<<: *m, x: 3}\nc: *m\nd: 2024-02-29\ne: 2001-12-14t21:59:43Z\nf: =\n", "x"
    )
    assert node is not None
    assert value_of(node, "x.yaml") == {
        "a": {"x": 1, "y": [2]},
        "b": {"x": 3, "y": [2]},
        "c": {"x": 1, "y": [2]},
        "d": "2024-02-29",
        "e": "2001-12-14t21:59:43Z",
        "f": "=",
    }


def test_included_texts_share_a_budget():
    content = b"\xef\xbb\xbfa: [1, 2, 3]\n"
    budget = Budget(nodes=14)
    for _ in range(2):
        node = compose_text(content, "a.yaml", budget=budget)
        assert node is not None
        assert value_of(node, "a.yaml") == {"a": [1, 2, 3]}
    assert budget.bytes == Budget().bytes - 2 * len(content)
    with pytest.raises(ConfigError, match="more than"):
        compose_text(content, "a.yaml", budget=budget)


def test_encodings():
    with pytest.raises(ConfigError, match=r"a.yaml:2: not valid YAML: not UTF-8 \(byte 0xff\)"):
        compose_text(b"a: 1\nb: \xff\n", "a.yaml")
    assert compose_text(b"", "a.yaml") is None
    assert compose_text(b"\xef\xbb\xbf# nothing\n", "a.yaml") is None


@pytest.mark.parametrize("text", ["a: !!int [1]", "a: !!map x", "a: {<<: 5}", "a: {<<: [[1]]}"])
def test_tags_on_nodes_of_another_kind(text):
    node = compose_text(text, "x.yaml")
    assert node is not None
    with pytest.raises(ConfigError, match=r"x.yaml:1: not valid YAML: "):
        value_of(node, "x.yaml")
