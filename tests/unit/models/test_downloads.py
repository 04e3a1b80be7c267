"""Downloads from faulty or malicious hubs: complete and in the cache, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oarlock.data.records.dataset_resolver import find_records
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.errors import DataError, ModelError
from oarlock.formats.names import find_name_problem, is_plain_path
from oarlock.hub import downloads, http_download
from oarlock.model_config.model_folder import find_model_folder

WEIGHTS = os.urandom(1 << 20)
INDEX = "model.safetensors.index.json"


class Hub:
    """A hub on loopback.

    Attributes:
        files: of the model some/model.
        asked: method and path of each request, and its Range.
        cut: after how many bytes each of the next answers ends.
        about: further headers of a file.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.cut: list[int] = []
        self.about: dict[str, dict[str, str]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, b"")

            def do_GET(self) -> None:
                hub.answer(self, None)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes | None) -> None:
        name, ranges = handler.path.removeprefix("/models/community/some/model/"), handler.headers.get("Range", "")
        self.asked.append((handler.command, name, ranges))
        about = dict(self.about.get(name, {}))
        if "Location" in about:
            handler.send_response(302)
            handler.send_header("Location", about["Location"])
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        content = self.files.get(name)
        if content is None:
            handler.send_error(404)
            return
        start = int(ranges.removeprefix("bytes=").rstrip("-")) if ranges else 0
        handler.send_response(206 if ranges else 200)
        if ranges:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        length = about.pop("Content-Length", str(len(content) - start))
        if length:
            handler.send_header("Content-Length", length)
        for key, value in about.items():
            handler.send_header(key, value)
        handler.end_headers()
        if body is None:
            part = content[start:]
            handler.wfile.write(part[: self.cut.pop(0)] if self.cut and name.endswith("tensors") else part)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    found = Hub()
    found.files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS}
    monkeypatch.setenv("PPNLP_ENDPOINT", found.address)
    monkeypatch.setattr(downloads, "_find_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(http_download, "_PAUSE_S", 0)
    yield found
    found.server.shutdown()
    found.server.server_close()


def names_in(tmp_path: Path) -> set[str]:
    return {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_model_is_downloaded_completely_and_once(hub, tmp_path):
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    hub.about["model.safetensors"] = {"ETag": f'"{digest}"'}
    folder = find_model_folder("some/model", with_weights=True)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS and folder == tmp_path / "cache/some/model"
    assert names_in(folder) == {"config.json", "model.safetensors", ".download.lock"}
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == (folder / "config.json").stat().st_mode & 0o777
    hub.asked.clear()
    assert find_model_folder("some/model", with_weights=True) == folder
    assert not [name for method, name, _ in hub.asked if method == "GET"], "what is in the cache is not downloaded"


HOSTILE = [
    "../../outside.safetensors", "/tmp/outside.safetensors", "a/b.safetensors", "http://127.0.0.1/x.safetensors",
    "..", ".safetensors", "a\\..\\b.safetensors", "C:x.safetensors", "x\0.safetensors", "x\n.safetensors",
    "-x.safetensors", "con.safetensors", "x" * 300 + ".safetensors", "\u202ex.safetensors", "config.json", "",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_may_name_only_weight_files(hub, tmp_path, name):
    hub.files[INDEX] = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": name}}).encode()
    hub.files["model-1.safetensors"] = WEIGHTS
    with pytest.raises(ModelError, match="name of a file next to it"):
        find_model_folder("some/model", with_weights=True)
    assert {asked for _, asked, _ in hub.asked} <= {"config.json", "generation_config.json", INDEX}
    assert names_in(tmp_path) <= {f"cache/some/model/{file}" for file in ("config.json", INDEX, ".download.lock")}


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"weight_map": 3}', b'{"weight_map": {}}', b"[" * 5000, b'{"weight_map": {"a": 1}}']
)
def test_an_invalid_index_is_named(hub, content):
    hub.files[INDEX] = content
    with pytest.raises(ModelError, match=INDEX):
        find_model_folder("some/model", with_weights=True)


def test_an_index_of_too_many_files_is_refused(hub):
    hub.files[INDEX] = json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(5000)}}).encode()
    with pytest.raises(ModelError, match="names 5,000 files"):
        find_model_folder("some/model", with_weights=True)


def test_no_shard_is_downloaded_if_one_is_missing(hub, tmp_path):
    hub.files[INDEX] = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    hub.files["model-1.safetensors"] = WEIGHTS
    with pytest.raises(ModelError, match=r"the hub has no model-2\.safetensors"):
        find_model_folder("some/model", with_weights=True)
    assert "model-1.safetensors" not in {path.name for path in (tmp_path / "cache/some/model").iterdir()}


@pytest.mark.parametrize("name", ["../x", "a/..", "a/../b", "a b/c", "a/b\n", "http:/x", "a//b", "-x/y", "a" * 200])
def test_model_names_resolve_to_the_cache(hub, name):
    with pytest.raises(ModelError, match=r"name on a hub|no such folder"):
        downloads.fetch(name, ["config.json"])
    with pytest.raises(ModelError):
        load_tokenizer(name)
    assert not hub.asked


# interruptions


def test_an_interrupted_download_is_resumed(hub, tmp_path):
    hub.about["model.safetensors"] = {"ETag": f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'}
    hub.cut = [300_000, 300_000]
    assert (find_model_folder("some/model", with_weights=True) / "model.safetensors").read_bytes() == WEIGHTS
    assert [ranges for method, name, ranges in hub.asked if (method, name) == ("GET", "model.safetensors")] == [
        "",
        "bytes=300000-",
        "bytes=600000-",
    ]


def test_a_later_process_resumes_an_interrupted_download(hub, tmp_path):
    hub.cut = [500_000, *[0] * 20]
    with pytest.raises(ModelError, match="cut off 5 times"):
        find_model_folder("some/model", with_weights=True)
    folder = tmp_path / "cache/some/model"
    assert not (folder / "model.safetensors").exists()
    hub.cut.clear()
    hub.asked.clear()
    find_model_folder("some/model", with_weights=True)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS and hub.asked[-1][2] == "bytes=500000-"


# false answers


def expect_failure(hub: Hub, tmp_path: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        find_model_folder("some/model", with_weights=True)
    assert not (tmp_path / "cache/some/model/model.safetensors").exists()


def test_a_wrong_checksum_is_detected_and_nothing_is_kept(hub, tmp_path):
    hub.about["model.safetensors"] = {"ETag": f'"{"0" * 64}"'}
    expect_failure(hub, tmp_path, "damaged in transit: its sha256 is")
    hub.about["model.safetensors"] = {"Content-MD5": "AAAAAAAAAAAAAAAAAAAAAA=="}
    expect_failure(hub, tmp_path, "damaged in transit: its md5 is")
    hub.about["model.safetensors"] = {"ETag": f'"{"0" * 32}"', "x-bce-request-id": "1"}
    expect_failure(hub, tmp_path, "damaged in transit: its md5 is")
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_a_size_mismatch_is_detected(hub, tmp_path):
    hub.about["model.safetensors"] = {"Content-Length": str(len(WEIGHTS) + 5)}
    expect_failure(hub, tmp_path, "cut off 5 times")
    hub.about["model.safetensors"] = {"Content-Length": "", "Connection": "close"}
    expect_failure(hub, tmp_path, "does not announce the file")


def test_a_download_that_does_not_fit_the_disk_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(http_download.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    expect_failure(hub, tmp_path, r"0\.00 GB are free")
    assert not [name for method, name, _ in hub.asked if method == "GET"]


def test_small_files_have_a_size_limit(hub):
    hub.about["config.json"] = {"Content-Length": str(1 << 40)}
    with pytest.raises(ModelError, match="too large for such a file"):
        find_model_folder("some/model", with_weights=False)


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x/", "http://[x"])
def test_redirects_to_other_schemes_are_refused(hub, tmp_path, place):
    hub.about["model.safetensors"] = {"Location": place}
    expect_failure(hub, tmp_path, r"only downloaded from http and https|can't be reached")


def test_redirects_are_followed_up_to_a_limit(hub, tmp_path):
    hub.files["elsewhere"] = WEIGHTS
    hub.about["model.safetensors"] = {"Location": "elsewhere"}
    assert (find_model_folder("some/model", with_weights=True) / "model.safetensors").read_bytes() == WEIGHTS
    shutil.rmtree(tmp_path / "cache")
    hub.about["model.safetensors"] = {"Location": "model.safetensors"}
    expect_failure(hub, tmp_path, "redirected more than 5 times")


def test_a_link_in_place_of_a_partial_file_is_not_followed(hub, tmp_path):
    hub.cut = [10, *[0] * 20]
    expect_failure(hub, tmp_path, "cut off")
    (half,) = (tmp_path / "cache").rglob("*.incomplete")
    half.unlink()
    (tmp_path / "victim").write_bytes(b"kept")
    half.symlink_to(tmp_path / "victim")
    hub.cut.clear()
    with pytest.raises(ModelError, match="can't be written there"):
        find_model_folder("some/model", with_weights=True)
    assert (tmp_path / "victim").read_bytes() == b"kept"


# names


@given(st.text(max_size=40) | st.text(alphabet="./\\:ab\0-~ ", max_size=12))
def test_a_plain_name_stays_in_its_folder(name):
    if not find_name_problem(name):
        assert os.path.normpath(os.path.join("/x", name)) == f"/x/{name}" and name == Path(name).name
        assert is_plain_path(f"a/{name}")
    if is_plain_path(name):
        assert os.path.normpath(os.path.join("/x", name)) == f"/x/{name}"


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "tokenizer.json", "vocab-größe.txt", "a b.json"])
def test_common_model_names_are_plain_names(name):
    assert find_name_problem(name) == ""


# data sets


@pytest.mark.parametrize(
    ("file", "fine"),
    [
        ("hf://datasets/some/data@abc/train.jsonl", True),
        ("/etc/passwd", False),
        ("http://127.0.0.1/x.jsonl", False),
        ("hf://datasets/other/data@abc/x.jsonl", False),
        ("hf://datasets/some/data-of-others@abc/x.jsonl", False),
    ],
)
def test_a_hub_data_set_contains_only_its_own_files(monkeypatch, file, fine):
    import datasets

    prepared = []
    builder = SimpleNamespace(
        repo_id="some/data",
        config=SimpleNamespace(data_files={"train": [file]}),
        download_and_prepare=lambda: prepared.append(1),
        as_dataset=lambda: {"train": [{"src": "a", "tgt": "b"}]},
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)
    if fine:
        assert len(find_records("some/data").train) == 1
    else:
        with pytest.raises(DataError, match="not one of its own files"):
            find_records("some/data")
    assert bool(prepared) == fine
