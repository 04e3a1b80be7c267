"""Merged models beside base + adapter: their weights, their scores, and every reason not to merge."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import paddle
import pytest
from paddlenlp.peft import LoRAModel
from paddlenlp.transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from safetensors.numpy import load_file, save_file

from helpers import logits_of, make_adapter, make_tiny_model, ordinary, run_program
from oarlock.data.templates.chat_template import ChatTemplate
from oarlock.errors import ConfigError, ModelError
from oarlock.merge import deltas, dequantized_base, verify
from oarlock.merge.inputs import AdapterMix
from oarlock.merge.merge import MergeOptions, merge
from oarlock.model_config.load import find_model_class
from oarlock.models import layer_offload
from oarlock.models.build import ModelSource, build_model
from oarlock.models.layer_offload import empty_model
from oarlock.peft.adapter_folder import ADAPTER_FILE, Base
from oarlock.peft.lora import LoRA
from oarlock.peft.method import method_of
from oarlock.peft.open_adapter import open_adapter
from oarlock.peft.prefix_tuning import Prefix
from oarlock.peft.quantization import Quantization
from oarlock.weights.shard_index import INDEX

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
IDS = np.random.default_rng(5).integers(0, 128, (2, 9))


def as_hugging_face(folder: Path, output: Path, prefix: str) -> Path:
    """The same model with transposed matrices, other names, bfloat16, in two files."""
    output.mkdir()
    shutil.copy(folder / "config.json", output)
    arrays = {}
    stored = load_file(folder / "model.safetensors")
    if np.array_equal(stored.get("lm_head.weight"), stored[f"{prefix}.embed_tokens.weight"]):
        del stored["lm_head.weight"]  # tied
    for name, values in stored.items():
        if "proj" in name or name == "lm_head.weight":
            values = np.ascontiguousarray(values.T)
        arrays[name.replace(f"{prefix}.", "model.")] = values.astype(ml_dtypes.bfloat16)
    names = sorted(arrays)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: arrays[name] for name in part}, output / f"model-{i}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    (output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return output


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    paddle.seed(3)
    config = Qwen2Config(**SMALL, tie_word_embeddings=True, architectures=["Qwen2ForCausalLM"])
    qwen = ordinary(Qwen2ForCausalLM(config))
    qwen.save_pretrained(str(folder / "qwen2-tied"), safe_serialization=True)
    llama = make_tiny_model(folder / "llama")
    return {
        "llama": llama,
        "qwen2-tied": folder / "qwen2-tied",
        "llama-hf": as_hugging_face(llama, folder / "llama-hf", "llama"),
        "qwen2-hf": as_hugging_face(folder / "qwen2-tied", folder / "qwen2-hf", "qwen2"),
    }


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory) -> Path:
    """Of the Llama; only ever read."""
    return make_adapter(bases["llama"], tmp_path_factory.mktemp("adapter") / "lora")


def scores(model) -> np.ndarray:
    return logits_of(model, IDS)


def tuned_model(base: Path, adapter: Path):
    settings = json.loads((adapter / "adapter.json").read_text())
    method = method_of(settings["method"], settings["settings"])
    return build_model(ModelSource(base, AutoConfig.from_pretrained(str(base)), True), method=method, adapter=adapter)


def whole_model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype="float32")


def close(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


# what is merged


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "llama-hf", "qwen2-hf"])
def test_merged_weights_and_scores(bases, tmp_path, name):
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
    assert close(scores(whole_model(tmp_path / "merged")), scores(tuned_model(base, adapter))) < (
        0.03 if half else 1e-5
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_several_adapters_are_added_with_their_weights(bases, tmp_path):
    """One of them on two kinds of layers only, with another rank and rsLoRA."""
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
def test_another_type(bases, adapter, tmp_path, dtype, capsys):
    proof = merge(bases["llama"], AdapterMix.open([adapter]), tmp_path / "merged", MergeOptions(dtype))
    assert 1e-5 < proof.difference < proof.allowed == verify.TOLERANCES[dtype]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {str(values.dtype) for values in merged.values()} == {dtype}
    assert AutoConfig.from_pretrained(str(tmp_path / "merged")).dtype == dtype
    assert f"allowed for {dtype}" in capsys.readouterr().out


def test_tokenizer_and_generation_settings_come_along(bases, tmp_path):
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
    ours = scores(tuned_model(bases["llama"], adapter))
    assert close(scores(theirs), ours) < 1e-6
    assert close(scores(whole_model(bases["llama"])), ours) > 0.1


@pytest.mark.parametrize("name", ["llama", "qwen2-hf"])
def test_qlora_is_merged_with_the_base_as_it_was_in_training(bases, tmp_path, capsys, monkeypatch, name):
    """Equal to the model with 4-bit weights, not to the one with exact weights; rounded in parts as in one piece."""
    monkeypatch.setattr(dequantized_base, "_ROWS_BYTES", 1000)
    how = Quantization("nf4", 16, double=True)
    adapter = make_adapter(bases[name], tmp_path / "adapter", LoRA(4, 6.0), method_saved=LoRA(4, 6.0, quantization=how))
    proof = merge(bases[name], AdapterMix.open([adapter]), tmp_path / "merged", MergeOptions("float32"))
    assert proof.difference < 1e-5
    merged = scores(whole_model(tmp_path / "merged"))
    assert close(merged, scores(tuned_model(bases[name], adapter))) < 1e-5
    content = json.loads((adapter / "adapter.json").read_text())
    content["settings"]["quantization"] = None
    (adapter / "adapter.json").write_text(json.dumps(content))
    assert close(merged, scores(tuned_model(bases[name], adapter))) > 0.01
    assert "as they were in training, rounded to nf4 in blocks of 16" in capsys.readouterr().out
    quantised = make_adapter(bases["llama"], tmp_path / "4-bit", LoRA(4, 6.0), LoRA(4, 6.0, quantization=how))
    with pytest.raises(ModelError, match="differently quantised"):
        AdapterMix.open([quantised, make_adapter(bases["llama"], tmp_path / "exact")])


# the proof


def test_streamed_scores_are_those_of_the_whole_model_with_one_layer_in_memory(bases):
    config = AutoConfig.from_pretrained(str(bases["llama"]))
    arrays = load_file(bases["llama"] / "model.safetensors")
    model = empty_model(find_model_class(config), config)
    most = 0

    def read(name, into):
        nonlocal most
        most = max(most, sum(parameter._is_initialized() for parameter in model.parameters()))
        return arrays[name]

    found = layer_offload.stream_logits(model, read, set(arrays), IDS)
    assert np.array_equal(found, scores(whole_model(bases["llama"])))
    assert most == 1  # the one that is being read
    assert not any(parameter._is_initialized() for parameter in model.parameters())


@pytest.mark.parametrize("wrong", ["scaling", "one layer"])
def test_a_wrong_merge_does_not_pass(bases, adapter, tmp_path, monkeypatch, wrong):
    right = deltas.Change.matrices

    def matrices(self):
        a, b = right(self)
        wrong_here = wrong == "scaling" or self.layer.endswith("layers.1.self_attn.k_proj")
        return (a, b * np.float32(1.02)) if wrong_here else (a, b)

    monkeypatch.setattr(deltas.Change, "matrices", matrices)
    with pytest.raises(ModelError, match="the merged model is not base \\+ adapters"):
        merge(bases["llama"], AdapterMix.open([adapter]), tmp_path / "new" / "merged")
    assert not list(tmp_path.glob("new/*")) and not list(tmp_path.glob("new/.*"))


def test_what_the_proof_accepts():
    tuned = np.linspace(-2, 2, 100, dtype=np.float32).reshape(1, 2, 50)
    plain, random = tuned + np.float32(0.1), np.random.default_rng(0)
    noise = random.uniform(-1, 1, tuned.shape).astype(np.float32)
    judge = verify.judge
    assert judge(tuned, plain, tuned + 1.5e-4 * noise, "float32").difference < 1e-4
    assert "--dtype" not in judge(tuned, plain, tuned, "float32").text()
    with pytest.raises(ModelError, match="differ by"):
        judge(tuned, plain, tuned + 1e-3 * noise, "float32")
    assert judge(tuned, plain, tuned + 1e-3 * noise, "bfloat16").allowed == 2.0**-5
    with pytest.raises(ModelError, match="differ by"):
        judge(tuned, plain, tuned + 0.1 * noise, "bfloat16")
    # an adapter so weak that its absence is within 1e-4
    with pytest.raises(ModelError, match="differ by"):
        judge(tuned, tuned + np.float32(1e-4), tuned + np.float32(1e-4), "float32")
    with pytest.raises(ModelError, match="too coarse"):
        judge(tuned, tuned + np.float32(1e-3), tuned + np.float32(1e-3), "bfloat16")
    assert "takes away" in judge(tuned, tuned + np.float32(1e-3), tuned + np.float32(9e-4), "bfloat16").text()
    for broken in ((tuned * np.nan, tuned), (tuned, tuned * np.inf)):
        with pytest.raises(ModelError, match="not finite"):
            judge(broken[0], plain, broken[1], "float32")


def test_an_adapter_of_zeros_is_said_to_be_one(bases, tmp_path, capsys):
    adapter = make_adapter(bases["llama"], tmp_path / "adapter", std=0.0)
    merge(bases["llama"], AdapterMix.open([adapter]), tmp_path / "merged")
    assert "the adapters change nothing" in capsys.readouterr().out


# refusals


def rewrite(folder: Path, change) -> None:
    path = folder / "peft_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "np"})


FIRST = "llama.layers.0.mlp.down_proj.lora_A"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: {k: v for k, v in arrays.items() if k != FIRST}, f"it lacks {FIRST}"),
        (lambda arrays: arrays | {"llama.layers.7.mlp.up_proj.lora_A": arrays[FIRST]}, "it has llama.layers.7"),
        (lambda arrays: arrays | {FIRST: arrays[FIRST][:5].copy()}, rf"{FIRST} is \[5, 4\], the model needs \[64, 4\]"),
    ],
)
def test_an_adapter_of_another_model_is_refused(bases, tmp_path, change, message):
    adapter = make_adapter(bases["llama"], tmp_path / "adapter")
    rewrite(adapter, change)
    with pytest.raises(ModelError, match=message):
        merge(bases["llama"], AdapterMix.open([adapter]), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_checkpoint_is_no_adapter_folder_and_the_message_says_how_to_make_one(adapter, tmp_path):
    with pytest.raises(ModelError, match=r"not an adapter folder: adapter\.json is missing$"):
        open_adapter(tmp_path)
    (tmp_path / INDEX).write_text("{}")  # as in a checkpoint of all weights, which holds no adapter
    with pytest.raises(ModelError, match=r"not an adapter folder: adapter\.json is missing$"):
        open_adapter(tmp_path)
    shutil.copyfile(adapter / ADAPTER_FILE, tmp_path / ADAPTER_FILE)
    with pytest.raises(ModelError, match=r"`oarlock checkpoint consolidate .* ADAPTER` makes"):
        open_adapter(tmp_path)


def test_another_base_is_refused(bases, adapter, tmp_path):
    """Other values, and (where there is no fingerprint) other shapes."""
    other = make_tiny_model(tmp_path / "other", initializer_range=0.2)
    mix = AdapterMix.open([adapter])
    with pytest.raises(ModelError, match="is not the base of this adapter"):
        merge(other, mix, tmp_path / "merged")
    wide = make_tiny_model(tmp_path / "wide", intermediate_size=96)
    unmarked = dataclasses.replace(mix, base=Base.of(str(wide), wide))
    with pytest.raises(ModelError, match=r"down_proj.lora_A is \[64, 4\], the model needs \[96, 4\]"):
        merge(wide, unmarked, tmp_path / "merged")
    elsewhere = make_adapter(other, tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="have different bases"):
        AdapterMix.open([adapter, elsewhere])
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*"))


def test_what_can_not_be_merged(bases, adapter, tmp_path):
    prefix = make_adapter(bases["llama"], tmp_path / "prefix", Prefix(3))
    with pytest.raises(ModelError, match="was trained with prefix: only LoRA adapters"):
        AdapterMix.open([prefix])
    with pytest.raises(ConfigError, match=r"1 adapter\(s\) and 2 weight\(s\)"):
        AdapterMix.open([adapter], [0.5, 0.5])
    with pytest.raises(ConfigError, match="finite"):
        AdapterMix.open([adapter], [float("nan")])
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="is not empty"):
        merge(bases["llama"], AdapterMix.open([adapter]), tmp_path / "merged")
    merge(bases["llama"], AdapterMix.open([adapter]), tmp_path / "merged", MergeOptions(proof=False, replace=True))
    assert not (tmp_path / "merged" / "mine.txt").exists() and (tmp_path / "merged" / "config.json").exists()


def test_a_full_disk_leaves_nothing(bases, adapter, tmp_path, monkeypatch):
    from oarlock.weights import save as module

    mix, output = AdapterMix.open([adapter]), tmp_path / "merged"
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
    with pytest.raises(ModelError, match="GB are free"):
        merge(bases["llama"], mix, output)
    monkeypatch.undo()

    def full(tensors, folder, *_):
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("oarlock.merge.merge.write_weights", full)
    with pytest.raises(ModelError, match="merged: the merged model could not be written: No space left"):
        merge(bases["llama"], mix, output)
    assert not list(tmp_path.iterdir())


def test_the_command(bases, adapter, tmp_path):
    """The base from where it was in training; the answer of the merged model is a model's."""
    words = ("--adapter", str(adapter), "--weight", "0.5", "--output", str(tmp_path / "merged"), "--dtype", "float16")
    done = run_program("oarlock", "merge", *words)
    assert done.returncode == 0, done.stderr
    assert "oarlock: proof: scores of the merged model" in done.stdout and "merged 0.5 x " in done.stdout
    assert load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"].dtype == np.float16
    again = run_program("oarlock", "merge", *words)
    assert again.returncode == 1 and "is not empty; give a folder that does not exist yet" in again.stderr
