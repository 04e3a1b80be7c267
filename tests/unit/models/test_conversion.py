"""What a conversion refuses, what it leaves behind, and the tables of words and names, both ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from families import FAMILIES, family_config
from helpers import make_tiny_model
from oarlock.errors import ModelError
from oarlock.export import convert as conversion
from oarlock.export.convert import ConvertOptions, convert
from oarlock.export.manifest import MANIFEST_FILE, find_changed_files, read_manifest, write_manifest
from oarlock.export.peft import export_peft
from oarlock.families.registry import HF_CONFIGS
from oarlock.model_config import hf_config
from oarlock.weights.safetensors_file import SafetensorsFile, TensorSource, write_safetensors

PLAIN = ConvertOptions(proof=False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def converted(llama, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "hf"
    convert(llama, output, "hf", PLAIN)
    return output


def changed(source: Path, folder: Path, tensors=lambda arrays: arrays, **config) -> Path:
    """A copy with other weights or other fields."""
    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    layout = "pt" if "torch_dtype" in (source / "config.json").read_text() else "np"
    save_file(tensors(load_file(path)), path, metadata={"format": layout})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return folder


def without(*names):
    return lambda arrays: {name: array for name, array in arrays.items() if name not in names}


# what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("llama.layers.1.mlp.up_proj.weight"), r"1 of 21 weights \(llama.layers.1.mlp.up_proj.weight\) is missing"),
        (lambda a: a | {"llama.layers.7.mlp.up_proj.weight": np.zeros(3, "f4")}, r"llama.layers.7.mlp.up_proj.weight\) is left over"),
        (lambda a: a | {"llama.norm.weight": np.zeros(3, "f4")}, r"llama.norm.weight has shape \[3\], but by config.json it is \[32\]"),
    ],
)  # fmt: skip
def test_every_weight_once_or_nothing(llama, tmp_path, change, message):
    source = changed(llama, tmp_path / "source", change)
    with pytest.raises(ModelError, match=message):
        convert(source, tmp_path / "out", "hf", PLAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_left_over_and_missing_in_hugging_faces_names(converted, tmp_path):
    extra = changed(
        converted, tmp_path / "a", lambda a: a | {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, "f4")}
    )
    with pytest.raises(ModelError, match=r"model.layers.0.self_attn.q_proj.bias\) is left over"):
        convert(extra, tmp_path / "out", "paddle", PLAIN)
    with pytest.raises(ModelError, match=r"llama.norm.weight\) is missing"):
        convert(changed(converted, tmp_path / "b", without("model.norm.weight")), tmp_path / "out", "paddle", PLAIN)
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.zeros(4, "f4") for i in range(2)}
    convert(changed(converted, tmp_path / "c", lambda a: a | tables), tmp_path / "out", "paddle", PLAIN)
    assert not any("inv_freq" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_a_tied_head_has_to_be_the_embedding(tmp_path):
    source = make_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" in load_file(source / "model.safetensors")
    convert(source, tmp_path / "hf", "hf", PLAIN)
    other = changed(source, tmp_path / "other", lambda a: a | {"lm_head.weight": a["lm_head.weight"] + 1})
    with pytest.raises(ModelError, match=r"lm_head.weight in the files has other values"):
        convert(other, tmp_path / "no", "hf", PLAIN)


def test_the_proof_stops_a_wrong_result(llama, tmp_path, monkeypatch):
    true = conversion.list_converted_tensors

    def wrong(*args):
        found = true(*args)
        tensor, stored = found[3]
        found[3] = TensorSource(tensor.name, tensor.dtype, tensor.shape, lambda: -tensor.read()), stored
        return found

    monkeypatch.setattr(conversion, "list_converted_tensors", wrong)
    with pytest.raises(ModelError, match="proof: the converted model differs from the source"):
        convert(llama, tmp_path / "out", "hf")
    assert not list(tmp_path.iterdir())


def test_places_and_pickles(llama, tmp_path):
    with pytest.raises(ModelError, match="is not empty"):
        convert(tmp_path, llama, "hf")
    with pytest.raises(ModelError, match=r"no config.json in this folder"):
        convert(tmp_path, tmp_path / "out", "hf")
    shutil.copy(llama / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="add --allow_pickle_weights"):
        convert(tmp_path, tmp_path / "out", "hf")


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(HF_CONFIGS)))
def test_families_that_transformers_has_not(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ModelError, match=f"{family}: .*transformers.*can be converted: llama, qwen2"):
        convert(tmp_path, tmp_path / "out", "hf")


# what is written


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_type(llama, tmp_path, dtype):
    found = convert(llama, tmp_path / "hf", "hf", ConvertOptions(dtype))
    assert 0 < found.proof.difference < found.proof.allowed and found.dtype == dtype
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == dtype
    with SafetensorsFile(tmp_path / "hf" / "model.safetensors") as file:
        assert {tensor.dtype.name for tensor in file.tensors.values()} == {dtype}
    back = convert(tmp_path / "hf", tmp_path / "back", "paddle")
    assert back.proof.difference == 0
    weights = load_file(tmp_path / "back" / "model.safetensors")
    exact = load_file(llama / "model.safetensors")
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    assert all(np.array_equal(weights[name], array.astype(kind)) for name, array in exact.items())


def test_bfloat16_as_paddlenlp_writes_it(llama, tmp_path):
    bits = {
        name: array.astype(ml_dtypes.bfloat16).view(np.uint16)
        for name, array in load_file(llama / "model.safetensors").items()
    }
    source = changed(llama, tmp_path / "source", lambda _: bits)
    convert(source, tmp_path / "hf", "hf")
    stored = load_file(tmp_path / "hf" / "model.safetensors")["model.norm.weight"]
    assert stored.dtype == ml_dtypes.bfloat16 and np.array_equal(stored.view(np.uint16), bits["llama.norm.weight"])


def test_generation_settings_and_template(llama, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    settings = {"top_p": 0.5, "max_length": 20, "decode_strategy": "sampling", "paddlenlp_version": "x"}
    (source / "generation_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "hf", "hf", PLAIN)
    content = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert content == {"top_p": 0.5, "do_sample": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    tokenizer = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == tokenizer["chat_template"]
    convert(tmp_path / "hf", tmp_path / "back", "paddle", PLAIN)
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["decode_strategy"] == "sampling"


def test_qwen2_with_another_tokenizer_is_told_of(llama, tmp_path, capsys):
    from oarlock.export.tokenizer_files import write_tokenizer

    write_tokenizer(llama, "hf", "qwen2", tmp_path)
    assert "splits text differently from Qwen2's own" in capsys.readouterr().out


def test_the_manifest_notices_every_change(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(f"content of {name}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d").write_text("d")
    write_manifest(tmp_path, target="x", proof={"difference": 1e-7})
    assert find_changed_files(tmp_path) == []
    content = read_manifest(tmp_path)
    assert content["target"] == "x" and set(content["files"]) == {"a", "b", "c", "sub/d"} and content["versions"]
    (tmp_path / "a").write_text("CONTENT of a")
    (tmp_path / "b").write_text("longer content of b")
    (tmp_path / "c").unlink()
    problems = find_changed_files(tmp_path)
    assert [problem.split()[0] for problem in problems] == ["a", "b", "c"] and len(set(problems)) == 3
    (tmp_path / MANIFEST_FILE).write_text("{}")
    with pytest.raises(ModelError, match="format and files are missing"):
        find_changed_files(tmp_path)


@given(data=st.data())
def test_writing_turns_and_rounds_any_shape(data, tmp_path_factory):
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3).map(tuple))
    dtype = data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    values = np.asarray(np.arange(int(np.prod(shape))).reshape(shape) / 7, np.float32)
    turned = values.T if data.draw(st.booleans()) else values
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    write_safetensors(path, [TensorSource("x", dtype, turned.shape, lambda: turned, cast=dtype != "float32")], {})
    found = load_file(path)["x"]
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    assert found.shape == turned.shape and np.array_equal(found, turned.astype(kind))


# words


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_scaling of type 'ntk'"),
        ("llama", {"head_dim": 16}, "head_dim is 16"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("mistral", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ("opt", {"word_embed_proj_dim": 8}, "word_embed_proj_dim 8 is not hidden_size 32"),
        ("opt", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("gptj", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
    ],
)
def test_what_paddlenlp_does_not_compute(family, change, message):
    content = hf_config.to_hugging_face(family_config(family), "float32", "x")
    assert hf_config.make_arguments(content, "x", ())["architectures"] == content["architectures"]
    with pytest.raises(ModelError, match=message):
        hf_config.make_arguments(content | change, "x", ())


@pytest.mark.parametrize(("family", "change"), [("llama", {"alibi": True}), ("gptj", {"layer_norm_epsilon": 1e-6})])
def test_what_transformers_does_not_compute(family, change):
    with pytest.raises(ModelError, match=next(iter(change))):
        hf_config.to_hugging_face(family_config(family, **change), "float32", "x")


@pytest.mark.parametrize("family", HF_CONFIGS)
def test_no_words_of_paddlenlp_alone(family):
    content = hf_config.to_hugging_face(family_config(family), "bfloat16", "x")
    alone = {
        "dtype",
        "alibi",
        "seq_length",
        "fuse_attention_qkv",
        "rope_scaling_type",
        "intermediate_size" if family == "opt" else "",
    }
    assert not alone & set(content) and content["torch_dtype"] == "bfloat16" and content["model_type"] == family


def test_only_lora_adapters_are_for_peft(tmp_path):
    with pytest.raises(ModelError, match="not an adapter folder"):
        export_peft(tmp_path, tmp_path / "out")
