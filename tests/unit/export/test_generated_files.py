"""Files written for shells and servers: no value of a model, a name or a folder is executed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.errors import ModelError, printable
from oarlock.export.checks.check import check_model
from oarlock.export.export import export
from oarlock.export.manifest import MANIFEST_FILE, read_manifest
from oarlock.export.request import ExportRequest
from oarlock.export.start_scripts import format_start_script, write_start_script
from oarlock.formats.quoting import quote_shell_word

CONFIG = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "max_position_embeddings": 64}
HOSTILE = (
    "$(touch RUN)", "`touch RUN`", "; touch RUN", "a b", "'", '"', "a\nb", "-x", "--help", "$HOME", "${IFS}", "a'b\"c$(x)",
    "*", "~", "!x", "\\", "#", "a}b", "\u202e", "é", "a\tb", "&&touch RUN", "|touch RUN", ">RUN", "{a,b}", "x\n",
)  # fmt: skip
HARD = st.sampled_from(HOSTILE) | st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12
)
FAKE = '#!/bin/bash\nprintf "%s\\0" "$@" >"$RECORD"\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with stand-ins for the servers that record their arguments."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "bin").mkdir()
    for name in ("vllm", "python"):
        (folder / "bin" / name).write_text(FAKE)
        (folder / "bin" / name).chmod(0o755)
    return folder


def run(script: Path, place: Path, *words: str, cwd: Path | None = None, **variables: str) -> list[str]:
    """The arguments that the server is started with."""
    environment = {"PATH": f"{place / 'bin'}:/usr/bin:/bin", "RECORD": str(place / "record"), **variables}
    (place / "record").unlink(missing_ok=True)
    for start in (["bash", "-n"], ["bash"]):
        subprocess.run([*start, str(script), *words], check=True, env=environment, cwd=cwd or place)
    return (place / "record").read_bytes().decode().split("\0")[:-1]


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


@settings(max_examples=40)
@given(value=HARD)
def test_a_quoted_shell_word_is_exactly_the_value(place, value):
    script = place / "word.sh"
    script.write_text(
        f'X=${{X:-{quote_shell_word(value)}}}  # after\nA=({quote_shell_word(value)})\nvllm "$X" "${{A[@]}}" {quote_shell_word(value)}\n'
    )
    assert run(script, place) == [value] * 3
    assert not (place / "RUN").exists()
    assert shlex.split(quote_shell_word(value)) == [value]


@settings(max_examples=25)
@given(
    folder=HARD.filter(lambda name: name.strip("./") and "/" not in name and len(name.encode()) < 200),
    extra=HARD,
    name=HARD,
)
@pytest.mark.parametrize("target", ["vllm", "fastdeploy"])
def test_start_scripts_work_with_special_characters(place, target, folder, extra, name):
    """In the folder, in arguments of the user, and in the served model name (from the environment)."""
    model = place / "models" / folder
    shutil.rmtree(place / "models", ignore_errors=True)
    model.mkdir(parents=True)
    write_start_script(target, CONFIG, "served", model, {"tone": 4} if target == "vllm" else {})
    script = model / "start.sh"
    for start, cwd in ((script, place), (Path("start.sh"), model), (Path("..", folder, "start.sh"), model)):
        words = run(start, place, extra, cwd=cwd, NAME=name, CDPATH="/tmp:/")
        given_model = after(words, "--model") if target == "fastdeploy" else words[1]
        assert os.path.samefile(given_model, model) and os.path.isabs(given_model)
        assert after(words, "--served-model-name") == (name or "served") and words[-1] == extra
        assert after(words, "--max-model-len") == "64"
        if target == "vllm":
            module = after(words, "--lora-modules")
            assert module.startswith("tone=/") and module.endswith("/adapters/tone")
    assert not list(place.rglob("RUN"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_position_embeddings": "$(touch RUN)"}, "config.json, max_position_embeddings"),
        ({"max_position_embeddings": True}, "whole number"),
        ({"max_position_embeddings": 10**12}, "whole number from 1"),
        ({"max_position_embeddings": None, "n_positions": "64; touch RUN"}, "config.json, n_positions"),
        ({"max_position_embeddings": None, "seq_length": [64]}, "config.json, seq_length"),
        ({"torch_dtype": "float32; touch RUN"}, "torch_dtype"),
        ({"torch_dtype": ["float32"]}, "torch_dtype"),
    ],
)
def test_scripts_contain_only_valid_lengths_and_dtypes(changes, says):
    with pytest.raises(ModelError, match=says):
        format_start_script("vllm", CONFIG | changes, "served")


@pytest.mark.parametrize("name", [value for value in HOSTILE if value != "é"] + ["", "é"])
def test_scripts_contain_only_valid_names(name):
    for arguments in ((name, {}), ("served", {name: 4})):
        with pytest.raises(ModelError, match="can't be the name"):
            format_start_script("vllm", CONFIG, *arguments)


@pytest.mark.parametrize("architectures", [None, [], [3], "$(touch RUN)", ["LlamaForCausalLM\ntouch RUN"], {"a": 1}])
def test_an_invalid_architecture_is_not_copied(architectures):
    text = format_start_script("fastdeploy", CONFIG | {"architectures": architectures}, "served")
    assert "touch" not in text


# the check of an export


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "out"
    export(ExportRequest("vllm", str(tiny_model), output, name="chat", proof=False))
    return output


def kinds(folder: Path, server: str = "vllm") -> dict[str, str]:
    return {finding.kind: finding.place for finding in check_model(folder, server)}


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("exec vllm", "touch RUN; exec vllm", 14),
        ("NAME:-chat", "NAME:-chat$(touch RUN)", 10),
        ("MAX_LENGTH:-256", "MAX_LENGTH:-9999", 12),
        ("set -euo pipefail\n", "", 4),
        ('"$@"\n', '"$@"\ntouch RUN\n', 16),
        ("#!/usr/bin/env bash", "#!/bin/evil", 1),
    ],
)
def test_a_modified_start_script_is_found(exported, tmp_path, old, new, line):
    folder = shutil.copytree(exported, tmp_path / "out")
    assert kinds(folder) == {} and kinds(folder, "hf") == {}
    text = (folder / "start.sh").read_text()
    assert old in text
    (folder / "start.sh").write_text(text.replace(old, new, 1))
    assert kinds(folder) == {"start": f"start.sh:{line}"}
    for manifest in ({**read_manifest(folder), "name": None}, None):  # as written by an older version, and without one
        (folder / MANIFEST_FILE).unlink()
        if manifest is not None:
            del manifest["name"]
            (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
        assert "start" in kinds(folder)


def test_unexpected_files_in_an_export_are_found(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "out")
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (folder / name).write_text("")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("")
    assert kinds(folder) == {}
    for name in ("notes.txt", "modeling_x.py", ".hidden"):
        (folder / name).write_text("")
        assert kinds(folder) == {"foreign": name}
        (folder / name).unlink()
    for name in ("sitecustomize.py", "Dockerfile", "x.ipynb"):  # values of the manifest are not executed
        (folder / name).write_text("")
        content = read_manifest(folder)
        content["files"][name] = {"bytes": 0, "sha256": "0" * 64}
        (folder / MANIFEST_FILE).write_text(json.dumps(content))
        assert kinds(folder) == {"foreign": name}
        (folder / name).unlink()
        del content["files"][name]
        (folder / MANIFEST_FILE).write_text(json.dumps(content))
    (folder / "start.sh").unlink()
    assert kinds(folder) == {"start": "start.sh"}
    os.mkfifo(folder / "start.sh")
    assert kinds(folder) == {"link": "start.sh"}


def test_custom_model_code_is_not_exported(exported, tmp_path):
    source = shutil.copytree(exported, tmp_path / "source")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((source / name).read_text()) | {"auto_map": {"AutoModelForCausalLM": "x.X"}}
        (source / name).write_text(json.dumps(content))
    (source / "x.py").write_text("import os")
    export(ExportRequest("hf", str(source), tmp_path / "out", proof=False))
    assert not any("auto_map" in path.read_text() for path in (tmp_path / "out").glob("*.json"))
    assert not list((tmp_path / "out").glob("*.py")) and not (tmp_path / "out/start.sh").exists()


def wrong_manifests() -> list[Any]:
    good = {"format": 1, "files": {}}
    return [
        "", "{", "[]", "3", '{"format": 1}', '{"format": 2, "files": {}}', "[" * 9000, '{"format": 1e999, "files": {}}',
        good | {"files": []}, good | {"files": {"a": 1}}, good | {"files": {"a": {"bytes": -1, "sha256": "0" * 64}}},
        good | {"files": {"../a": {"bytes": 1, "sha256": "0" * 64}}}, good | {"target": 3}, good | {"name": ["x"]},
        good | {"files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}, good | {"versions": {"oarlock": 1}},
        good | {"template": {}}, good | {"files": {"a": {"bytes": True, "sha256": "0" * 64}}},
    ]  # fmt: skip


@pytest.mark.parametrize("content", wrong_manifests(), ids=str)
def test_an_invalid_manifest_is_a_finding(exported, tmp_path, content):
    folder = shutil.copytree(exported, tmp_path / "out")
    (folder / MANIFEST_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    assert "manifest" in kinds(folder)
    with pytest.raises(ModelError, match=MANIFEST_FILE):
        read_manifest(folder)


# names on the console and in JSON


@pytest.mark.parametrize("name", [b"m\xff", b"m\x1b]0;x\x07", b"a b\n$(touch RUN)", b"-m", "模型".encode(), b"%s{0}"])
def test_a_folder_of_any_name_is_exported_or_refused(tiny_model, place, name, capsys, monkeypatch):
    monkeypatch.chdir(place)
    source, output = Path(os.fsdecode(b"from-" + name)), Path(os.fsdecode(b"./to-" + name))
    for folder in (source, output):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_model, source)
    try:
        export(ExportRequest("vllm", str(source), output, proof=False))
        assert check_model(output, "vllm") == []
        said = capsys.readouterr().out
        assert f"bash {printable(shlex.quote(str(output / 'start.sh')))}" in said and "\x1b" not in said
    except ModelError as error:
        assert name == b"m\xff" and "not UTF-8" in str(error) and printable(str(error)).isascii()
    assert not list(place.glob("RUN")) and not list(place.glob("*.partial"))


def test_findings_contain_no_terminal_escapes(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "out")
    (folder / os.fsdecode(b"x\x1b[2J\n\xff.py")).write_text("")
    (finding,) = check_model(folder, "vllm")
    assert finding.to_line().startswith("x\\x1b[2J\\n\\udcff.py: not a file of the export")
