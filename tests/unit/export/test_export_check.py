"""For a directory broken in one way, the checker finds exactly that fault."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oarlock.cli.main import make_parser
from oarlock.cli.parser import run_parsed
from oarlock.errors import ConfigError
from oarlock.export.checks.check import check_folder, check_model, guess_server
from oarlock.export.manifest import write_manifest
from support.broken_exports import ANYWHERE, leftover
from support.broken_indexes import WITH_INDEX
from support.broken_tokenizers import lose_template
from support.small_exports import (
    change,
    make_good,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("good")
    return {shards: make_good(folder / str(shards), shards) for shards in (1, 3)}


@pytest.mark.parametrize("server", ["hf", "vllm", "fastdeploy"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_valid_directory_has_no_findings(good, server, shards):
    assert check_model(good[shards], server) == []


@pytest.mark.parametrize("way", [*ANYWHERE, *WITH_INDEX], ids=lambda way: way.__name__)
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_each_fault_is_the_only_finding(way, good, tmp_path, data):
    shards = data.draw(st.sampled_from([3] if way in WITH_INDEX else [1, 3]))
    server = data.draw(st.sampled_from(["hf", "vllm", "fastdeploy"]))
    folder = tmp_path / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good[shards], folder)
    kind = way(folder, lambda choices: choices[data.draw(st.integers(0, len(choices) - 1))])
    findings = check_model(folder, server)
    assert {finding.kind for finding in findings} == {kind}, findings
    assert all(finding.place and finding.problem and finding.remedy for finding in findings)


def test_dtype_keys_of_each_server(good, tmp_path):
    """Newer transformers write `dtype`, which FastDeploy takes as a sign of Paddle's layout."""
    folder = shutil.copytree(good[1], tmp_path / "model")
    for keys, servers in (
        ({"torch_dtype": "gone", "dtype": "float32"}, {"fastdeploy"}),
        ({"torch_dtype": "float32", "dtype": "float32"}, {"fastdeploy"}),
        ({"torch_dtype": "gone", "dtype": "gone"}, {"hf", "vllm", "fastdeploy"}),
        ({"torch_dtype": "float32", "dtype": "gone"}, set()),
    ):
        change(folder, "config.json", **keys)
        assert {server for server in ("hf", "vllm", "fastdeploy") if check_model(folder, server)} == servers, keys


def test_fastdeploy_runs_fewer_models(good, tmp_path):
    folder = shutil.copytree(good[1], tmp_path / "model")
    change(folder, "config.json", architectures=["MistralForCausalLM"], model_type="mistral")
    assert check_model(folder, "vllm") == []  # the same weights
    (finding,) = check_model(folder, "fastdeploy")
    assert finding.kind == "architecture" and "Qwen2ForCausalLM" in finding.remedy


def test_the_manifest_decides_the_rules(good, tmp_path):
    folder = shutil.copytree(good[1], tmp_path / "model")
    assert guess_server(folder) == "hf"
    for target, server in (("vllm", "vllm"), ("fastdeploy", "fastdeploy"), ("hf", "hf")):
        write_manifest(folder, target=target)
        assert guess_server(folder) == server
    write_manifest(folder, target="peft")
    with pytest.raises(ConfigError, match="--server"):
        guess_server(folder)
    with pytest.raises(ConfigError, match="no such folder"):
        guess_server(tmp_path / "nowhere")


def test_a_model_exported_without_a_template_needs_none(good, tmp_path):
    folder = shutil.copytree(good[1], tmp_path / "model")
    lose_template(folder, None)
    assert [finding.kind for finding in check_model(folder, "vllm")] == ["template"]
    write_manifest(folder, target="vllm")
    assert check_folder(folder, "vllm") == []


def test_hashes_are_compared_with_the_manifest(good, tmp_path):
    folder = shutil.copytree(good[3], tmp_path / "model")
    write_manifest(folder, target="vllm")
    assert check_folder(folder, "vllm", hashes=True) == []
    change(folder, "generation_config.json", top_p=0.5)
    assert check_folder(folder, "vllm") == []
    (finding,) = check_folder(folder, "vllm", hashes=True)
    assert finding.kind == "changed" and finding.place == "generation_config.json"


def test_the_command_prints_findings_and_fails(good, tmp_path, capsys):
    folder = shutil.copytree(good[1], tmp_path / "model")
    leftover(folder, lambda choices: choices[0])
    parsed = make_parser().parse_args(["export", "--check", str(folder), "--server", "fastdeploy"])
    assert run_parsed(parsed) == 1
    printed = capsys.readouterr().out
    assert "model_state.pdparams: a server may read it" in printed and "1 problem found" in printed
    (folder / "model_state.pdparams").unlink()
    assert run_parsed(parsed) == 0 and "no problems found" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--check DIR"):
        run_parsed(make_parser().parse_args(["export", "--check", str(folder), "--target", "vllm"]))
