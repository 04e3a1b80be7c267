"""Exported directories: their content, their verification, and every reason not to export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from families import FAMILIES, family_config, family_model
from helpers import logits_of, run_program
from oarlock.errors import ConfigError, ModelError
from oarlock.export import export as export_module
from oarlock.export import request as request_module
from oarlock.export import static_graph
from oarlock.export.checks.check import check_model
from oarlock.export.export import export
from oarlock.export.manifest import find_changed_files, read_manifest
from oarlock.export.request import ExportRequest, check_options, check_source
from oarlock.export.static_graph import write_graph
from oarlock.families.registry import HF_CONFIGS
from oarlock.model_config.load import find_model_class, read_config
from oarlock.models.build import ModelSource, build_model
from oarlock.models.layer_offload import make_empty_model
from oarlock.peft.adapter_folder import Base, save_adapter
from oarlock.peft.lora import LoRA
from oarlock.peft.method import trainable_parameters
from oarlock.weights.safetensors_file import TensorSource

IDS = np.random.default_rng(3).integers(0, 512, (2, 9))


@pytest.fixture(scope="module")
def lora(tiny_model, tmp_path_factory) -> Path:
    """A LoRA adapter with random matrices for the tiny Llama."""
    folder, method = tmp_path_factory.mktemp("adapters") / "tone", LoRA(r=4, alpha=6.0)
    random, config, tensors = np.random.default_rng(0), read_config(tiny_model), []
    for parameter in trainable_parameters(make_empty_model(find_model_class(config), config, method)):
        values = (random.standard_normal(parameter.slice.shape) * 0.1).astype(np.float32)
        tensors.append(TensorSource(parameter.name, "float32", values.shape, lambda values=values: values))
    folder.mkdir()
    save_adapter(tensors, method, Base.from_folder(str(tiny_model), tiny_model), None, None, folder)
    return folder


def compute_logits(folder: Path, **about) -> np.ndarray:
    model = build_model(ModelSource(folder, read_config(folder), from_weights=True), **about)
    return logits_of(model, IDS)


# directories in Hugging Face's layout


@pytest.mark.parametrize("target", ["hf", "fastdeploy"])
def test_an_exported_merged_model_passes_the_check(tiny_model, lora, tmp_path, target):
    output = tmp_path / "out"
    export(ExportRequest(target, "", output, (lora,)))  # the base is where the adapter says
    expected = compute_logits(tiny_model, method=LoRA(r=4, alpha=6.0), adapter=lora)
    assert np.abs(compute_logits(output) - expected).max() < 1e-5 * np.abs(expected).max()
    manifest = read_manifest(output)
    assert manifest["target"] == target and manifest["source"]["folder"] == str(tiny_model)
    assert manifest["source"]["adapters"][0]["folder"] == str(lora)
    assert manifest["proof"]["merge"]["effect"] > 0.1 and manifest["proof"]["conversion"]["difference"] < 1e-5
    assert manifest["template"] == (output / "chat_template.jinja").read_text()
    assert find_changed_files(output) == [] and check_model(output, target) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family", HF_CONFIGS)
def test_the_checker_accepts_the_weights_of_every_family(family, tiny_tokenizer, tmp_path):
    folder = tmp_path / "model"
    tied = {"tie_word_embeddings": True} if family in ("qwen2", "opt") else {}
    family_model(family, **tied).save_pretrained(str(folder), safe_serialization=True)
    shutil.copytree(tiny_tokenizer, folder, dirs_exist_ok=True)
    export(ExportRequest("vllm", str(folder), tmp_path / "out", max_shard_bytes=60_000))
    out = tmp_path / "out"
    assert check_model(out, "vllm") == [] and check_model(out, "hf") == []
    arrays = {name: values for path in out.glob("*.safetensors") for name, values in load_file(path).items()}
    for path in out.glob("*.safetensors*"):
        path.unlink()
    for name in arrays:
        save_file(
            {key: values for key, values in arrays.items() if key != name}, out / "model.safetensors", {"format": "pt"}
        )
        (finding,) = check_model(out, "hf")
        assert finding.kind == "names" and finding.place == name


def read_start_command(script: Path, program: str, folder: Path, **variables: str) -> list[str]:
    """The command line with which a start script runs its server."""
    fake = folder / program
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables}
    environment.pop("PYTHON", None)  # which would be the one that starts
    words = ["bash", str(script), "--more", "flags"]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_vllm_starts_with_an_adapter(tiny_model, lora, tmp_path):
    output = tmp_path / "a model"
    export(ExportRequest("vllm", str(tiny_model), output, (lora,), name="chat", dtype="bfloat16", keep_adapters=True))
    assert os.access(output / "start.sh", os.X_OK)
    words = read_start_command(output / "start.sh", "vllm", tmp_path)
    assert words[:2] == ["serve", str(output)] and words[-2:] == ["--more", "flags"]
    assert (after(words, "--served-model-name"), after(words, "--dtype")) == ("chat", "bfloat16")
    assert (after(words, "--max-model-len"), after(words, "--host"), after(words, "--port")) == (
        "256",
        "127.0.0.1",
        "8000",
    )
    assert after(words, "--lora-modules") == f"tone={output}/adapters/tone" and after(words, "--max-lora-rank") == "8"
    assert (output / "adapters/tone/adapter_config.json").is_file() and "--enable-lora" in words
    words = read_start_command(
        output / "start.sh", "vllm", tmp_path, PORT="9000", HOST="0.0.0.0", MAX_LENGTH="64", DTYPE="auto"
    )
    assert [after(words, f"--{name}") for name in ("port", "host", "max-model-len", "dtype")] == [
        "9000",
        "0.0.0.0",
        "64",
        "auto",
    ]
    stored, plain = load_file(output / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert stored[name].dtype.name == "bfloat16"
    assert np.allclose(stored[name].astype(np.float32), plain[name.replace("model", "llama", 1)].T, rtol=2**-8)
    assert check_model(output, "vllm") == [] and find_changed_files(output) == []


def test_the_printed_fastdeploy_command_starts(tiny_model, tmp_path):
    output = tmp_path / "out"
    export(ExportRequest("fastdeploy", str(tiny_model), output))
    script = output / "start.sh"
    assert "PaddleFormers" in script.read_text()
    words = read_start_command(script, "python", tmp_path, QUEUE_PORT="7000")
    assert words[:2] == ["-m", "fastdeploy.entrypoints.openai.api_server"] and after(words, "--model") == str(output)
    ports = [after(words, f"--{name}port") for name in ("", "metrics-", "engine-worker-queue-")]
    assert ports == ["8180", "8181", "7000"] and after(words, "--load-choices") == "default_v1"


def test_a_peft_export_contains_the_adapter_only(tiny_model, lora, tmp_path):
    export(ExportRequest("peft", str(tiny_model), tmp_path / "out", (lora,)))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "oarlock_export.json"}


# complete or absent


def test_a_failed_export_leaves_nothing(tiny_model, lora, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_start_script", refuse)
    with pytest.raises(ModelError, match="No space left"):
        export(ExportRequest("vllm", str(tiny_model), tmp_path / "out", (lora,)))
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_the_check_is_discarded(tiny_model, tmp_path, monkeypatch):
    broken = shutil.copytree(tiny_model, tmp_path / "model")
    about = json.loads((broken / "tokenizer.json").read_text())
    about["added_tokens"].append({**about["added_tokens"][0], "id": 600, "content": "<new>"})
    (broken / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match="token 600 is beyond the 512 rows"):
        export(ExportRequest("hf", str(broken), tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# refused before any work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "--model DIR is missing"),
        ({"target": "peft"}, "--adapter DIR"),
        ({"keep_adapters": True}, "--target vllm and --adapter"),
        ({"target": "triton", "dtype": "float16"}, "--dtype"),
        ({"name": "a b"}, "--name"),
        ({"target": "triton", "adapters": (Path("a/x"), Path("b/x"))}, "have the name x"),
    ],
)
def test_incompatible_options_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        check_options(ExportRequest(**({"target": "hf", "model": "m", "output": tmp_path / "out"} | changes)))


def test_models_that_a_server_lacks_are_refused(tiny_model, tmp_path, monkeypatch):
    def source(name: str, family: str = "") -> Path:
        folder = shutil.copytree(tiny_model, tmp_path / name)
        (folder / "config.json").write_text(json.dumps({"model_type": family or name, "architectures": []}))
        return folder

    with pytest.raises(ModelError, match=r"FastDeploy 2.x does not run MistralForCausalLM .*Qwen2ForCausalLM"):
        check_source(ExportRequest("fastdeploy", "m", tmp_path / "out"), source("mistral"))
    check_source(ExportRequest("vllm", "m", tmp_path / "out"), tmp_path / "mistral")
    with pytest.raises(ModelError, match="chatglm: transformers has no ChatGLM"):
        check_source(ExportRequest("hf", "m", tmp_path / "out"), source("chatglm"))
    for target in ("triton", "paddle-inference"):
        check_source(ExportRequest(target, "m", tmp_path / "out"), tmp_path / "chatglm")
        with pytest.raises(ModelError, match="gpt_oss models can't be run here: our decoder's experts have neither"):
            check_source(ExportRequest(target, "m", tmp_path / "out"), source(f"gpt_oss-{target}", "gpt_oss"))
    (tmp_path / "mistral" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        check_source(ExportRequest("vllm", "m", tmp_path / "out"), tmp_path / "mistral")
    monkeypatch.setattr(request_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ModelError, match=r"takes about 0.05 GB.*0.00 GB are free"):
        check_source(ExportRequest("hf", "m", tmp_path / "out"), tiny_model)


def test_a_wrong_command_does_not_import_paddle(tiny_model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    words = ["export", "--model", str(tiny_model), "--target", "vllm", "--output", str(tmp_path / "full")]
    result = run_program("oarlock", *words, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert result.returncode == 1 and "is not empty" in result.stderr
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time")
    }
    assert "argparse" in imported and not {"paddle", "paddlenlp"} & imported
    assert (tmp_path / "full" / "x").exists()


# static graphs


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in FAMILIES),
        *((family, {"fuse_attention_qkv": True, "fuse_attention_ffn": True}) for family in ("llama", "qwen2")),
    ],
    ids=str,
)
@pytest.mark.usefixtures("fused_ops")
def test_every_family_is_exported_as_a_static_graph(family, changes, tmp_path):
    model = family_model(family, **changes)
    model.save_pretrained(str(tmp_path / "weights"), safe_serialization=True)
    config = family_config(family, **changes)
    proof = write_graph(ModelSource(tmp_path / "weights", config, from_weights=True), tmp_path)
    assert proof.difference < 1e-5 and len({tokens for _, tokens in proof.shapes}) == 4
    # Checked not only by the export itself: loaded by Paddle's other reader, next to a second model of the same weights.
    ids = np.random.default_rng(8).integers(4, 512, (2, 11))
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)}
    inputs = {name: paddle.to_tensor(feed[name]) for name in proof.inputs}
    found = paddle.jit.load(str(tmp_path / "model"))(*inputs.values()).numpy()
    with paddle.no_grad():
        model.eval()
        result = model(**inputs)
    expected = (result[0] if isinstance(result, (tuple, list)) else result).numpy()
    assert np.abs(found - expected)[mask.astype(bool)].max() < 1e-5 * np.abs(expected).max()


def test_a_graph_folder_has_everything_needed_for_inference(tiny_model, tmp_path):
    export(ExportRequest("paddle-inference", str(tiny_model), tmp_path / "out"))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"model.json", "model.pdiparams", "config.json", "tokenizer.json", "chat_template.jinja"}
    manifest = read_manifest(tmp_path / "out")
    assert manifest["proof"]["graph"]["inputs"] == ["input_ids", "attention_mask", "position_ids"]
    assert manifest["disable_mkldnn"] and find_changed_files(tmp_path / "out") == []


def test_a_graph_with_other_logits_is_discarded(tiny_model, tmp_path, monkeypatch):
    run = static_graph._run_graph
    monkeypatch.setattr(static_graph, "_run_graph", lambda *args: run(*args) * 1.001)
    with pytest.raises(ModelError, match="differs from the model"):
        export(ExportRequest("paddle-inference", str(tiny_model), tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
