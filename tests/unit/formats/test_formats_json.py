"""Untrusted JSON: what is refused and with which message; everything else is read as by the json module."""

from __future__ import annotations

import json
import os
import resource
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Ge
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import TypedDict

from oarlock.errors import DataError, ModelError, OarlockError
from oarlock.formats.files import read_bytes
from oarlock.formats.json_file import parse_json, read_json, read_json_if_there
from oarlock.formats.json_places import locate_fields


@dataclass(frozen=True)
class Layer:
    name: str
    sizes: tuple[Annotated[int, Ge(0)], ...] = ()


class Model(TypedDict, total=False):
    layers: list[Layer]
    scale: float
    tie: bool
    alias: str | list[str] | None


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**39), 10**39)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES, st.sampled_from([None, 0, 2]), st.booleans())
def test_every_json_value_is_read(value, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert parse_json(text, "x.json") == value == parse_json(b"\xef\xbb\xbf" + text.encode(), "x.json")


@given(st.text() | st.text(alphabet='[]{}",:\\u0d8tfn-1eE. \n'))
def test_any_text_is_read_or_refused_as_by_the_json_module(text):
    try:
        found = parse_json(text, "x.json")
    except OarlockError as error:
        assert str(error).startswith("x.json")
        assert "\n" not in str(error)
    else:
        assert found == json.loads(text.removeprefix("\ufeff"))


@given(VALUES)
def test_every_field_has_a_line_number(value):
    text = json.dumps(value, indent=1)
    lines = text.split("\n")
    for place, line in locate_fields(text):
        item = value
        for step in place:
            item = item[step]
        start = lines[line - 1].strip().rstrip(",")
        if isinstance(place[-1], str):
            start = start.removeprefix(json.dumps(place[-1]) + ": ")
        assert json.dumps(item).startswith(start) or start in ("[", "{", "[]", "{}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{\n"a": 1,\n"b": {"a": 2, "c": 3,\n"c": 4}}', ":4: field 'c' appears twice in one object"),
        ('{"a": 1, "a": 2', ":1: not valid JSON: "),
        ("[1,\n NaN]", ":2: NaN is not a JSON number"),
        ("[1, -Infinity]", ":1: -Infinity is not a JSON number"),
        ("[\n\n1e999]", ":3: 1e999 is too large for a number"),
        ("[1,\n" + "9" * 41 + "]", ":2: an integer of 41 digits (at most 40 are read)"),
        ("9" * 5_000_000, " 5,000,000 bytes is too large"),
        ("[\n" * 65 + "]" * 65, ":65: objects and lists more than 64 levels deep"),
        ("[" * 100_000, ":1: objects and lists more than 64 levels deep"),
        ('{"a":' * 100_000, ":1: objects and lists more than 64 levels deep"),
        ('"' + '\\"' * 100_000, ":1: not valid JSON: Unterminated string"),
        ('["\\n",\n"a\\ud800b"]', ":2: \\ud800 is a lone surrogate"),
        ('{\n"\\uDC00": 1}', ":2: \\udc00 is a lone surrogate"),
        (b'{"a":\n"\xff"}', ":2: not UTF-8 (byte 0xff)"),
        ('{"a": "\ud800"}', ":1: not UTF-8 (byte 0xed)"),
        ("[1]".encode("utf-16"), ": UTF-16; JSON is read as UTF-8"),
        ("[1]".encode("utf-32"), ": UTF-32; JSON is read as UTF-8"),
        ("", ":1: not valid JSON: Expecting value (column 1)"),
        ("{'a': 1}", ":1: not valid JSON: Expecting property name enclosed in double quotes (column 2)"),
    ],
)
def test_refusals_give_the_line(text, reason):
    with pytest.raises(DataError) as caught:
        parse_json(text, "x.json", error=DataError)
    assert reason.lower() in str(caught.value).lower()
    assert str(caught.value).startswith("x.json:")


def test_brackets_in_strings_do_not_count_as_nesting():
    text = json.dumps({"a" * 3: ['[[{"' * 5000, "\\", '\\"[' * 100]})
    assert parse_json(text, "x.json") == json.loads(text)


def test_a_surrogate_pair_is_one_character():
    assert parse_json('"\\ud83d\\ude00"', "x.json") == "😀"


def test_too_many_values_are_refused_before_allocation():
    with pytest.raises(ModelError, match="more than 100 objects and lists"):
        parse_json("[" + "{}," * 100 + "1]", "x.json", containers=100)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            '{"layers":\n[{"name": "a",\n "sizes": [1,\n-2]}]}',
            ":4: layers[0].sizes[1] must be greater than or equal to 0; got -2",
        ),
        ('{"layers": [{"sizes": [1]}]}', ":1: layers[0]: name is missing"),
        ('{"scale": "5"}', ":1: scale must be a number; got '5'"),
        ('{"tie": 1}', ":1: tie must be true or false; got 1"),
        ('{"layers": {}}', ":1: layers must be a list; got an object"),
        ('{\n"alias": 5}', ":2: alias must be a string or a list; got 5"),
        ("[]", " the content must be an object; got a list"),
        ('{"tie": null, "scale": null}', " (and 1 more fields)"),
    ],
)
def test_schema_errors_state_what_is_expected(text, reason):
    with pytest.raises(ModelError) as caught:
        parse_json(text, "x.json", Model)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"layers": [' + "{}," * 200_000 + "1]}", ": layers[0]: name is missing"),
        ('{"sizes": {' + ",".join(f'"k{i}": -1' for i in range(100_000)) + "}}", ": sizes.k0 must be greater than"),
        (
            '{"layers": [],' + ",".join(f'"k{i}": 1' for i in range(100_000)) + "}",
            ": 100,000 fields are wrong or unknown",
        ),
        ("{" + ",".join(f'"k{i}": 1' for i in range(100_000)) + ', "k7": 1}', ":1: field 'k7' appears twice"),
    ],
)
def test_invalid_files_are_refused_cheaply(text, reason):
    class Many(TypedDict, total=False):
        layers: list[Layer]
        sizes: dict[str, Annotated[int, Ge(0)]]

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError) as caught:
        parse_json(text, "x.json", Many, extra="forbid")
    assert reason in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


def test_lists_become_tuples_and_objects_dataclasses():
    found = parse_json('{"layers": [{"name": "a", "sizes": [1, 2]}], "scale": 3, "other": 1}', "x.json", Model)
    assert found == {"layers": [Layer("a", (1, 2))], "scale": 3}


def test_fields_without_a_schema_are_left_out_kept_or_refused():
    text = '{"scale": 1.5, "other": {"a": [1]}}'
    assert parse_json(text, "x.json", Model) == {"scale": 1.5}
    assert parse_json(text, "x.json", Model, extra="allow") == json.loads(text)
    with pytest.raises(ModelError, match="other is not a known field here"):
        parse_json(text, "x.json", Model, extra="forbid")


def test_plain_types(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json", dict[str, int]) == {"a": 1}
    with pytest.raises(ModelError, match=r"a.json:1: a must be a string; got 1"):
        read_json(tmp_path / "a.json", dict[str, str])
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ModelError, match="not a JSON object"):
        read_json(tmp_path / "a.json", dict[str, Any])


def test_paths_that_are_not_regular_files_are_refused(tmp_path):
    """The reader never waits for them, and never reports them as missing."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to("missing")
    (tmp_path / "circle").symlink_to("circle")
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{short}/socket")
        (tmp_path / "socket").symlink_to(f"{short}/socket")
        for name, reason in {
            "pipe": "a pipe, not a regular file",
            "socket": "a socket, not a regular file",
            ".": "a folder, not a regular file",
            "/dev/zero": "a device, not a regular file",
            "nowhere": "No such file",
            "circle": "circle",
            "a\0b": r"a\0b: a path can't hold a NUL character",
            "x" * 300: "File name too long",
        }.items():
            with pytest.raises(DataError) as caught:
                read_json_if_there(tmp_path / name, dict[str, Any], error=DataError)
            assert reason in str(caught.value)
    assert read_json_if_there(tmp_path / "missing", dict[str, Any]) is None
    assert read_json_if_there(tmp_path / "missing" / "deeper", dict[str, Any]) is None
    with pytest.raises(ModelError, match="No such file"):
        read_json(tmp_path / "missing", dict[str, Any])


def test_a_file_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "a.json").write_bytes(b"x" * 100)
    assert read_bytes(tmp_path / "a.json", limit=100) == b"x" * 100
    with pytest.raises(ModelError, match="100 bytes is too large for a recipe"):
        read_bytes(tmp_path / "a.json", limit=99, what="recipe")
    with pytest.raises(ModelError, match="too large"):  # its size is 0, its content is not
        read_bytes(Path("/proc/self/status"), limit=50)
