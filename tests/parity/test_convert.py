"""Converted models in transformers, and transformers' models in Paddle: the same logits, answers, ids and bits.

transformers runs in the Python of scripts/parity_env.sh, in one process for all models (transformers_peer.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.errors import ModelError
from oarlock.export import peft
from oarlock.export.convert import ConvertOptions, convert
from oarlock.export.manifest import find_changed_files, read_manifest
from oarlock.export.peft import export_peft
from oarlock.model_config.load import find_model_class, read_config
from oarlock.weights.safetensors_file import SafetensorsFile
from support.converted_models import ADAPTERS, OURS, PIECES, TEXTS, THEIRS, World, answer, compute_logits, loaded


@pytest.fixture(scope="module")
def world(tmp_path_factory, parity_python) -> World:
    return World(tmp_path_factory.mktemp("world"), parity_python)


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(0)] if 0 in ids else ids


def read_bits(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The dtype, shape and bytes of every stored tensor."""
    found = {}
    for path in folder.glob("model*.safetensors"):
        with SafetensorsFile(path) as file:
            for name, about in file.tensors.items():
                array = np.empty(about.shape, about.dtype)
                file.read(name, 0, array)
                found[name] = (about.dtype.name, about.shape, array.tobytes())
    return found


# from Paddle to transformers


@pytest.mark.parametrize("name", OURS)
def test_our_models_run_in_transformers(world, name):
    found, said = world.theirs(f"ours {name}")
    np.testing.assert_allclose(found, world.scores[name], atol=1e-4, rtol=0)
    assert until_end(said["answer"]) == world.answers[name]
    assert len(set(world.answers[name])) > 1 or name == "opt norms after"  # without a final norm it repeats itself
    assert said["class"] == find_model_class(read_config(world.root / "ours" / name)).__name__
    assert said["dtype"] == "torch.float32"
    assert world.proofs[name].difference < 1e-6


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma", "opt", "bloom", "gptj"])
def test_the_tokenizer_and_template_are_copied(world, name):
    said = world.theirs(f"ours {name}")[1]
    here = load_tokenizer(str(world.root / "ours" / name))
    assert said["token_ids"] == [list(here(text)["input_ids"]) for text in TEXTS]
    assert said["decoded"] == TEXTS
    assert said["prompt"] == "<|user|>How far?<|assistant|>"


def test_a_folder_with_only_a_sentencepiece_model(world):
    said = world.theirs(f"ours {PIECES}")[1]
    here = load_tokenizer(str(world.root / "ours" / PIECES))
    assert said["token_ids"] == [list(here(text)["input_ids"]) for text in TEXTS]
    assert (world.root / "hf" / PIECES / "tokenizer.model").exists()


@pytest.mark.parametrize("name", OURS)
def test_a_round_trip_preserves_every_bit(world, name, tmp_path):
    back = tmp_path / "back"
    convert(world.root / "hf" / name, back, "paddle", ConvertOptions(proof=False))
    before, after = read_bits(world.root / "ours" / name), read_bits(back)
    computed = {key for key in before if ".attn.bias" in key or ".masked_bias" in key}
    copies = {"lm_head.weight", "lm_head.decoder_weight"} if read_config(back).tie_word_embeddings else set()
    if "fused" in name:
        again = tmp_path / "again"
        convert(back, again, "hf", ConvertOptions(proof=False))
        assert read_bits(again) == read_bits(world.root / "hf" / name)
        return
    assert before.keys() - after.keys() <= computed | copies
    assert all(before[key] == value for key, value in after.items())


def test_contents_of_the_converted_folder(world):
    folder = world.root / "hf" / "llama"
    content = json.loads((folder / "config.json").read_text())
    assert content["architectures"] == ["LlamaForCausalLM"] and content["torch_dtype"] == "float32"
    assert not {"dtype", "alibi", "rope_scaling_type", "paddlenlp_version", "fuse_attention_qkv", "seq_length"} & set(
        content
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = read_bits(folder)
    assert set(index["weight_map"]) == set(stored) and len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in stored.values())
    q = load_file(world.root / "ours" / "llama" / "model.safetensors")["llama.layers.1.self_attn.k_proj.weight"]
    assert stored["model.layers.1.self_attn.k_proj.weight"][1:] == (q.T.shape, np.ascontiguousarray(q.T).tobytes())
    with open(folder / index["weight_map"]["lm_head.weight"], "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"] == {"format": "pt"}
    manifest = read_manifest(folder)
    assert manifest["source"]["layout"] == "np" and manifest["proof"]["difference"] < 1e-6
    assert "lm_head.weight" not in read_bits(world.root / "hf" / "llama tied")
    assert find_changed_files(folder) == []
    assert not any(folder.glob("*.pdparams"))


# from transformers to Paddle


@pytest.mark.parametrize("name", THEIRS)
def test_transformers_models_run_in_paddle(world, name, tmp_path):
    source = world.root / "theirs" / name
    options = ConvertOptions(allow_pickle="pickle" in name)
    proof = convert(source, tmp_path / "paddle", "paddle", options).proof
    assert proof.difference < 1e-6
    found, said = world.theirs(f"theirs {name}")
    model = loaded(tmp_path / "paddle")
    np.testing.assert_allclose(compute_logits(model), found, atol=1e-4, rtol=0)
    assert answer(model) == until_end(said["answer"])
    if "pickle" not in name:
        convert(tmp_path / "paddle", tmp_path / "hf", "hf", ConvertOptions(proof=False))
        assert read_bits(tmp_path / "hf") == read_bits(source)
        if "bfloat16" not in name:  # and without conversion
            np.testing.assert_allclose(compute_logits(loaded(source)), found, atol=1e-4, rtol=0)
    dtype = "bfloat16" if "bfloat16" in name else "float32"
    assert {kind for kind, _, _ in read_bits(tmp_path / "paddle").values()} == {dtype}


# adapters


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_reads_our_adapters(world, name):
    found, _ = world.theirs(f"adapter {name}")
    ours = compute_logits(loaded(world.root / "ours" / name, world.root / "adapter" / name))
    np.testing.assert_allclose(found, ours, atol=1e-4, rtol=0)
    assert np.abs(found - world.theirs(f"ours {name}")[0]).max() > 0.1
    stored = load_file(world.root / "peft" / name / "adapter_model.safetensors")
    content = json.loads((world.root / "peft" / name / "adapter_config.json").read_text())
    assert content["peft_type"] == "LORA" and content["base_model_name_or_path"] == f"{world.root}/ours/{name}"
    assert {key.split(".")[-3] for key in stored} == set(content["target_modules"])
    if name == "llama fused":
        assert {"q_proj", "v_proj", "up_proj"} <= set(content["target_modules"])


def test_an_adapter_that_converts_to_other_values_is_not_written(world, monkeypatch, tmp_path):
    name = next(iter(ADAPTERS))
    own = peft._make_config
    monkeypatch.setattr(peft, "_make_config", lambda *about: own(*about) | {"r": 2 * own(*about)["r"]})
    with pytest.raises(ModelError, match="by other values than the adapter"):
        export_peft(world.root / "adapter" / name, tmp_path / "out", base=f"{world.root}/ours/{name}")
    assert not list(tmp_path.iterdir())
