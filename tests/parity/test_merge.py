"""Merged weights and logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from paddlenlp.peft import LoRAModel
from paddlenlp.transformers import AutoConfig
from safetensors.numpy import load_file

from helpers import make_adapter, run_program
from oarlock.data.templates.chat_template import ChatTemplate
from oarlock.errors import ModelError
from oarlock.merge import dequantized_base
from oarlock.merge.inputs import AdapterMix
from oarlock.merge.merge import MergeOptions, merge
from oarlock.models.build import ModelSource, build_model
from oarlock.models.proof import TOLERANCES
from oarlock.peft.lora import LoRA
from oarlock.peft.method import restore_method
from oarlock.peft.quantization import Quantization
from support.merge_models import compute_logits, whole_model


def tuned_model(base: Path, adapter: Path):
    settings = json.loads((adapter / "adapter.json").read_text())
    method = restore_method(settings["method"], settings["settings"])
    return build_model(ModelSource(base, AutoConfig.from_pretrained(str(base)), True), method=method, adapter=adapter)


def close(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


# merging


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "llama-hf", "qwen2-hf"])
def test_merged_weights_and_logits(bases, tmp_path, name):
    base, adapter = bases[name], make_adapter(bases[name], tmp_path / "adapter")
    proof = merge(base, AdapterMix.open([adapter]), tmp_path / "merged", MergeOptions(max_shard_bytes=40_000))
    half = name.endswith("hf")
    assert proof.difference < (0.03 if half else 1e-5) and proof.effect > 0.1
    paddle_layout = load_file(bases[name.replace("-hf", "" if "llama" in name else "-tied")] / "model.safetensors")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(tmp_path / "merged" / file) for file in set(index.values())}
    if "qwen2" in name:
        del paddle_layout["lm_head.weight"]  # PaddleNLP writes the tied embeddings twice
    assert len(files) > 1 and set(index) == set(paddle_layout)
    low_rank = load_file(adapter / "peft_model.safetensors")
    for key, weight in paddle_layout.items():
        merged = files[index[key]][key]
        weight = weight.astype(ml_dtypes.bfloat16) if half else weight
        assert merged.dtype == weight.dtype and merged.shape == weight.shape
        layer = key.removesuffix(".weight")
        if f"{layer}.lora_A" not in low_rank:
            assert np.array_equal(merged, weight), key
            continue
        a, b = (low_rank[f"{layer}.lora_{letter}"].astype(np.float64) for letter in "AB")
        expected = weight.astype(np.float64) + 6.0 / 4 * a @ b
        assert np.abs(merged - expected).max() < (2.0**-8 * np.abs(expected).max() if half else 1e-6), key
    assert close(compute_logits(whole_model(tmp_path / "merged")), compute_logits(tuned_model(base, adapter))) < (
        0.03 if half else 1e-5
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_several_adapters_are_added_with_their_weights(bases, tmp_path):
    """One of them covers only two kinds of layers, with another rank and rsLoRA."""
    base = bases["llama"]
    first = make_adapter(base, tmp_path / "first")
    second = make_adapter(base, tmp_path / "second", LoRA(2, 4.0, targets=("q_proj", "down_proj"), rslora=True), seed=1)
    proof = merge(base, AdapterMix.open([first, second], [0.7, -0.3]), tmp_path / "merged")
    assert proof.difference < 1e-5 < proof.effect
    merged, plain = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base))
    one, two = (load_file(folder / "peft_model.safetensors") for folder in (first, second))
    for layer, factor in (("q_proj", -0.3 * 4 / np.sqrt(2)), ("v_proj", 0.0)):
        name = f"llama.layers.1.self_attn.{layer}"
        change = 0.7 * 6 / 4 * one[f"{name}.lora_A"] @ one[f"{name}.lora_B"]
        if factor:
            change += factor * two[f"{name}.lora_A"] @ two[f"{name}.lora_B"]
        assert np.abs(merged[f"{name}.weight"] - plain[f"{name}.weight"] - change).max() < 1e-6
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert [part["weight"] for part in record["adapters"]] == [0.7, -0.3]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.usefixtures("fused_ops")
def test_another_dtype(bases, adapter, tmp_path, dtype, capsys):
    proof = merge(bases["llama"], AdapterMix.open([adapter]), tmp_path / "merged", MergeOptions(dtype))
    assert 1e-5 < proof.difference < proof.allowed == TOLERANCES[dtype]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {str(values.dtype) for values in merged.values()} == {dtype}
    assert AutoConfig.from_pretrained(str(tmp_path / "merged")).dtype == dtype
    assert f"allowed for {dtype}" in capsys.readouterr().out


def test_tokenizer_and_generation_settings_are_copied(bases, tmp_path):
    base, adapter = bases["llama"], make_adapter(bases["llama"], tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (base / name).exists():
            shutil.copy(base / name, adapter)
    ChatTemplate("mine", "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}", {}).save(adapter)
    (adapter / "generation_config.json").write_text('{"top_p": 0.25}')
    merge(base, AdapterMix.open([adapter]), tmp_path / "merged", MergeOptions(proof=False))
    name = "chat_template.jinja"
    assert (tmp_path / "merged" / name).read_text() == (adapter / name).read_text()
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text()) == {"top_p": 0.25}
    tokenizers = [json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path / "merged", adapter)]
    assert tokenizers[0] == tokenizers[1]
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["proof"] is None


def test_paddlenlp_reads_our_adapters(bases, adapter):
    theirs = LoRAModel.from_pretrained(whole_model(bases["llama"]), str(adapter))
    ours = compute_logits(tuned_model(bases["llama"], adapter))
    assert close(compute_logits(theirs), ours) < 1e-6
    assert close(compute_logits(whole_model(bases["llama"])), ours) > 0.1


@pytest.mark.parametrize("name", ["llama", "qwen2-hf"])
def test_qlora_is_merged_with_the_dequantized_base(bases, tmp_path, capsys, monkeypatch, name):
    """Equal to the model with 4-bit weights, not to the one with exact weights; identical in parts and in one piece."""
    monkeypatch.setattr(dequantized_base, "_CHUNK_BYTES", 1000)
    how = Quantization("nf4", 16, double=True)
    adapter = make_adapter(bases[name], tmp_path / "adapter", LoRA(4, 6.0), method_saved=LoRA(4, 6.0, quantization=how))
    proof = merge(bases[name], AdapterMix.open([adapter]), tmp_path / "merged", MergeOptions("float32"))
    assert proof.difference < 1e-5
    merged = compute_logits(whole_model(tmp_path / "merged"))
    assert close(merged, compute_logits(tuned_model(bases[name], adapter))) < 1e-5
    content = json.loads((adapter / "adapter.json").read_text())
    content["settings"]["quantization"] = None
    (adapter / "adapter.json").write_text(json.dumps(content))
    assert close(merged, compute_logits(tuned_model(bases[name], adapter))) > 0.01
    assert "the weights of training, quantized to nf4 in blocks of 16" in capsys.readouterr().out
    quantised = make_adapter(bases["llama"], tmp_path / "4-bit", LoRA(4, 6.0), LoRA(4, 6.0, quantization=how))
    with pytest.raises(ModelError, match="differently quantized"):
        AdapterMix.open([quantised, make_adapter(bases["llama"], tmp_path / "exact")])


def test_the_command(bases, adapter, tmp_path):
    """The base is found from the training run; the merged model can answer."""
    words = ("--adapter", str(adapter), "--weight", "0.5", "--output", str(tmp_path / "merged"), "--dtype", "float16")
    done = run_program("oarlock", "merge", *words)
    assert done.returncode == 0, done.stderr
    assert "oarlock: proof: logits of the merged model" in done.stdout and "merged 0.5 x " in done.stdout
    assert load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"].dtype == np.float16
    again = run_program("oarlock", "merge", *words)
    assert again.returncode == 1 and "is not empty; give a folder that does not exist yet" in again.stderr
