"""The JSON reader with schemas of every type: it returns what json reads, or an error that names the file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge
from harness import Harness
from typing_extensions import TypedDict

from oarlock.errors import OarlockError
from oarlock.formats.json_file import parse_json, read_json


@dataclass
class Part:
    name: str
    sizes: tuple[Annotated[int, Ge(0)], ...] = ()
    parts: list[Part] = field(default_factory=list)


class Whole(TypedDict, total=False):
    parts: list[Part]
    scale: float
    on: bool
    either: str | list[str] | dict[str, float] | None


def target(data: bytes, folder: Path) -> None:
    path = folder / "x.json"
    path.write_bytes(data)
    try:
        found = read_json(path, Whole, extra="allow")
    except OarlockError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error), error
    else:
        assert set(found) == set(json.loads(data.decode("utf-8-sig")))
    assert parse_json(data, "x.json") == json.loads(data.decode("utf-8-sig"))


def seeds() -> list[bytes]:
    part = {"name": "a", "sizes": [1, 2], "parts": [{"name": "b"}]}
    contents = [
        {"parts": [part, part], "scale": 1.5e3, "on": True, "either": None, "other": [1, -2.5, "x\n\u00e9"]},
        {"either": {"a": 1}}, {"either": ["a", "b"]}, {"parts": []}, [], "x", 1,
    ]  # fmt: skip
    return [json.dumps(c, indent=i, ensure_ascii=a).encode() for c in contents for i, a in ((None, True), (1, False))]


HARNESS = Harness(
    target,
    seeds,
    tokens=[
        b"NaN",
        b"Infinity",
        b"1e999",
        b"\\ud800",
        b"\\u0000",
        b"[" * 70,
        b'{"a":' * 70,
        b"9" * 50,
        b"\xef\xbb\xbf",
        b'"parts":',
        b'"name":',
        b'"sizes":',
        b'"scale":',
        b"null",
        b"\xff",
        b'"a":1,"a":2',
    ],
)
