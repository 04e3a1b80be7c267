"""Folders of data files: which files are read, and which are reported as skipped."""

from __future__ import annotations

import os

import pytest

from oarlock.data.files.find_files import LeftOut, find_sources, list_files
from oarlock.data.records.dataset_resolver import find_records
from oarlock.data.records.record_stream import FileRecords
from oarlock.errors import DataError
from support.text_files import read

# folders


def test_a_folder_with_everything_in_it(tmp_path):
    data, disk = tmp_path / "data", tmp_path / "disk"
    for folder in (data / "sub", data / ".git", disk / "deep"):
        folder.mkdir(parents=True)
    for path in (data / "a.jsonl", data / "sub" / "b.jsonl", data / ".git" / "x.jsonl", data / "._a.jsonl",
                 disk / "c.jsonl", disk / "deep" / "d.jsonl"):  # fmt: skip
        path.write_text('{"text": "x"}\n')
    for name, content in (("settings.json", '{\n "a": 1\n}\n'), ("e.jsonl.bz2", "x"), ("part-00000", "x"), ("f.tar", "x"),
                          ("g.bin", "x")):  # fmt: skip
        (data / name).write_text(content)
    os.symlink(disk, data / "linked")
    os.symlink(disk, data / "linked again")
    os.symlink(data, disk / "loop")
    os.symlink(data / "a.jsonl", data / "same.jsonl")
    os.symlink(tmp_path / "absent", data / "broken.jsonl")
    os.symlink(data / "itself", data / "itself")
    os.mkfifo(data / "pipe.jsonl")
    left_out = LeftOut()
    found = [str(one.path.relative_to(data)) for one in find_sources([str(data)], left_out)]
    assert found == ["a.jsonl", "linked/c.jsonl", "linked/deep/d.jsonl", "sub/b.jsonl"]
    said = left_out.text()
    assert left_out.count == 13 and "... and 3 more" in said
    left_out = LeftOut()
    left_out.named = named = _All()
    find_sources([str(data)], left_out)
    reasons = {line.split(": ", 1)[0].removeprefix(f"{data}/"): line.split(": ", 1)[1] for line in named}
    assert reasons.pop("linked again") == f"a link: it is {data}/linked, which is read already"
    assert reasons.pop("linked/loop") == f"a loop: it is {data}, which is read already"
    assert reasons.pop("same.jsonl") == f"a link: it is {data}/a.jsonl, which is read already"
    known = ".txt, .md, .text, .jsonl, .ndjson, .json, .csv, .tsv, .parquet, also as .gz or .zst"
    assert reasons == {
        ".git": "hidden",
        "._a.jsonl": "hidden",
        "broken.jsonl": "a dangling link",
        "itself": "a link that leads to itself",
        "pipe.jsonl": "neither a file nor a folder",
        "settings.json": "one JSON object over several lines; lists and JSON Lines are read",
        "e.jsonl.bz2": "compressed as .bz2; gz and zst are read",
        "f.tar": "an archive; unpack it",
        "part-00000": f"no ending; supported are {known}",
        "g.bin": f"the ending .bin; supported are {known}",
    }


class _All(list):
    """A list that LeftOut treats as short."""

    def __len__(self) -> int:
        return 0


def test_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    left_out = LeftOut()
    found = find_sources([str(tmp_path), str(tmp_path / "a.jsonl")], left_out)
    assert len(found) == 1 and left_out.named == [f"{tmp_path}/a.jsonl: listed before, as {tmp_path}/a.jsonl"]


def test_the_content_of_json_files_decides_their_format(tmp_path):
    (tmp_path / "c4.00001.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "list.json").write_text(' [{"text": "three"}]')
    (tmp_path / "small.json").write_text('{"text": "four"}')
    found = [read(one)[0] for one in find_sources([str(tmp_path)], LeftOut())]
    assert found == [["one", "two"], ["three"], ["four"]]


def test_skipped_record_files_are_named(tmp_path):
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl", "more.jsonl", "old.jsonl.bz2", "README.md", ".hidden.jsonl"):
        (tmp_path / name).write_text('{"src": "a", "tgt": "b"}')
    found = find_records(str(tmp_path))
    assert sorted(found.left_out.named) == [
        f"{tmp_path}/.hidden.jsonl: hidden",
        f"{tmp_path}/README.md: not a data file",
        f"{tmp_path}/more.jsonl: not named train... or dev..., unlike others here",
        f"{tmp_path}/old.jsonl.bz2: compressed as .bz2; gz and zst are read",
        f"{tmp_path}/test.jsonl: dev... is the dev set already",
    ]


def test_train_and_dev_files_are_recognized_by_name(tmp_path):
    for name in ("train/a.jsonl", "val/b.jsonl", "test/c.jsonl", "dataset_info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = find_records(str(tmp_path))
    assert [source.name for source in found.dev] == [str(tmp_path / "val/b.jsonl")]
    said = found.left_out.text()
    assert "c.jsonl: val... is the dev set already" in said and "dataset_info.json: describes data" in said


def test_unsupported_archives_are_named(tmp_path):
    for name, reason in (("a.jsonl.bz2", "compressed as .bz2"), ("a.zip", "an archive; unpack it")):
        (tmp_path / name).write_bytes(b"x")
        for attempt in (lambda path: find_sources([str(path)], LeftOut()), FileRecords.detect):
            with pytest.raises(DataError, match=rf"{name}: .*{reason}"):
                attempt(tmp_path / name)
    (tmp_path / "part-00000").write_text('{"text": "x"}\n')
    assert FileRecords.detect(tmp_path / "part-00000").source.format == "jsonl", "the content decides"


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="can't be listed: Permission denied"):
        list_files(tmp_path, LeftOut())
