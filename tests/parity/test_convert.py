"""Converted models in transformers, transformers' models in Paddle: the same scores, answers, ids, and the same bits.

transformers runs in the Python of scripts/parity_env.sh, in one process for all models (transformers_peer.py).
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from families import family_model
from helpers import logits_of, make_tiny_tokenizer
from oarlock.data.embedded.instructions import instruction_records
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.errors import ModelError
from oarlock.export import peft
from oarlock.export.convert import ConvertOptions, convert
from oarlock.export.manifest import changed_files, read_manifest
from oarlock.export.peft import export_peft
from oarlock.model_config.load import find_model_class, read_config
from oarlock.models.build import ModelSource, build_model
from oarlock.models.generate import generate_ids
from oarlock.models.layer_offload import empty_model
from oarlock.peft.adapter_folder import Base, save_adapter
from oarlock.peft.lora import LoRA
from oarlock.peft.method import method_of, trained
from oarlock.weights.safetensors_file import SafetensorsFile, TensorSource

PEER = Path(__file__).with_name("transformers_peer.py")
IDS = np.random.default_rng(3).integers(1, 512, (2, 12))
PROMPT = [7, 100, 3, 1, 2, 7]
SPECIAL = SimpleNamespace(eos_token_id=0, pad_token_id=0, bos_token_id=0)
TEXTS = ["Hello, world! 12 + 345.", "  two  spaces,\tänd 中文\n\n", "a<|user|>b<|endoftext|>"]
MESSAGES = [{"role": "user", "content": "How far?"}]
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SHORT = {"max_position_embeddings": 8}  # the texts are longer

# Models of ours: name -> family, what is particular.
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama fused": ("llama", {"fuse_attention_qkv": True, "fuse_attention_ffn": True}),
    "llama tied": ("llama", {"tie_word_embeddings": True, "rope_theta": 5e5}),
    "llama linear": ("llama", {"rope_scaling_type": "linear", "rope_scaling_factor": 4.0}),
    "llama ntk": ("llama", {"rope_scaling_type": "ntk", "rope_scaling_factor": 2.0}),
    "llama dynamic": ("llama", {"rope_scaling_type": "dynamic_ntk", "rope_scaling_factor": 2.0, **SHORT}),
    "llama 3": ("llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "qwen2": ("qwen2", {}),
    "qwen2 fused tied": ("qwen2", {"fuse_attention_qkv": True, "fuse_attention_ffn": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 64}),  # the texts are shorter
    "gemma": ("gemma", {}),
    "gemma untied": ("gemma", {"tie_word_embeddings": False, "hidden_act": "gelu_pytorch_tanh"}),
    "opt": ("opt", {}),
    "opt norms after": ("opt", {"normalize_before": False}),
    "opt untied": ("opt", {"tie_word_embeddings": False}),
    "bloom": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "gptj": ("gptj", {}),
}  # fmt: skip
PIECES = "llama tied"  # its tokenizer is a sentencepiece model alone
_TOKENS = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SIZES = _TOKENS | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
_OPT = _TOKENS | {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
}
_LINEAR = {"rope_type": "linear", "factor": 2.0}
# Models of theirs: name -> what the peer is asked to make.
THEIRS: dict[str, dict[str, Any]] = {
    "llama": {"make": {"model_type": "llama", **_SIZES}},
    "llama bfloat16 shards": {"make": {"model_type": "llama", **_SIZES}, "dtype": "bfloat16", "max_shard_size": "40KB"},
    "llama pickle": {"make": {"model_type": "llama", **_SIZES}, "pickle": True},
    "llama linear": {"make": {"model_type": "llama", **_SIZES, "rope_parameters": {"rope_theta": 5e4, **_LINEAR}}},
    "llama dynamic": {
        "make": {"model_type": "llama", **_SIZES, **SHORT, "rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}}
    },
    "llama 3": {"make": {"model_type": "llama", **_SIZES, "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}}},
    "qwen2": {"make": {"model_type": "qwen2", **_SIZES, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}},
    "mistral": {"make": {"model_type": "mistral", **_SIZES, "sliding_window": None}},
    "gemma": {"make": {"model_type": "gemma", **_SIZES, "head_dim": 16}},
    "opt": {"make": {"model_type": "opt", **_OPT}},
    "opt untied": {"make": {"model_type": "opt", **_OPT, "tie_word_embeddings": False}},
    "bloom": {"make": {"model_type": "bloom", **_TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}},
    "gptj": {"make": {"model_type": "gptj", **_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4}},
}  # fmt: skip
ADAPTERS = {
    "llama": LoRA(4, 6.0),
    "llama fused": LoRA(4, 4.0, rslora=True),
    "opt": LoRA(2, 4.0, targets=("q_proj", "linear2")),
}


def make_tokenizer(folder: Path, family: str) -> None:
    make_tiny_tokenizer(folder)
    if family == "qwen2":  # as Qwen2's own cuts text: transformers 5 takes that for granted
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        split = {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
        content["normalizer"] = {"type": "NFC"}
        content["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [split, content["pre_tokenizer"] | {"use_regex": False}],
        }
        path.write_text(json.dumps(content))


def make_pieces(folder: Path) -> None:
    """A sentencepiece model as Llama's is made, under PaddleNLP's name and without a tokenizer.json."""
    import sentencepiece

    texts = [record["instruction"] + " " + record["output"] for record in instruction_records("train")[:300]]
    with open(folder / "sentencepiece.bpe.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=480, model_type="bpe", byte_fallback=True,
            character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')


def stirred(name: str):
    """A model whose answers hang on all that it reads."""
    family, changes = OURS[name]
    model = family_model(family, **changes)
    random = np.random.default_rng(5)
    for path, parameter in model.named_parameters():
        if len(parameter.shape) > 1 and "embed" not in path and "wte" not in path and "lm_head" not in path:
            noise = random.normal(0, 0.6, parameter.shape)
            parameter.set_value(parameter + paddle.to_tensor(noise.astype("float32")))
    model.eval()
    return model


def scores(model) -> np.ndarray:
    return logits_of(model, IDS)


def answer(model) -> list[int]:
    return generate_ids(model, SPECIAL, [PROMPT], 32)[0]


def loaded(folder: Path, adapter: Path | None = None):
    settings = json.loads((adapter / "adapter.json").read_text()) if adapter else {}
    method = method_of(settings["method"], settings["settings"]) if adapter else None
    model = build_model(ModelSource(folder, read_config(folder), True), method=method, adapter=adapter)
    model.eval()
    return model


def make_adapter(base: Path, folder: Path, method: LoRA) -> Path:
    config, random, tensors = read_config(base), np.random.default_rng(1), []
    for holding in trained(empty_model(find_model_class(config), config, method)):
        values = (random.standard_normal(holding.block.shape) * 0.2).astype(np.float32)
        tensors.append(TensorSource(holding.name, "float32", values.shape, lambda values=values: values))
    folder.mkdir(parents=True)
    save_adapter(tensors, method, Base.of(str(base), base), None, None, folder)
    return folder


class World:
    """Every model on both sides, made once."""

    def __init__(self, root: Path, python: str) -> None:
        self.root, jobs = root, []
        self.scores: dict[str, np.ndarray] = {}
        self.answers: dict[str, list[int]] = {}
        self.proofs: dict[str, Any] = {}
        about = {"ids": IDS.tolist(), "generate": PROMPT}
        for name, (family, _) in OURS.items():
            model, folder = stirred(name), root / "ours" / name
            model.save_pretrained(
                str(folder), safe_serialization=True, max_shard_size="100KB" if "fused" in name else "5GB"
            )
            if name == PIECES:
                make_pieces(folder)
            else:
                make_tokenizer(folder, family)
            self.scores[name], self.answers[name] = scores(model), answer(model)
            shards = 30_000 if name == "llama" else 10**9
            self.proofs[name] = convert(folder, root / "hf" / name, "hf", ConvertOptions(shard_bytes=shards)).proof
            jobs.append(
                {
                    **about,
                    "folder": f"{root}/hf/{name}",
                    "out": f"{root}/said/ours {name}",
                    "texts": TEXTS,
                    "messages": None if name == PIECES else MESSAGES,
                }
            )
        for name, method in ADAPTERS.items():
            adapter = make_adapter(root / "ours" / name, root / "adapter" / name, method)
            proven = export_peft(adapter, root / "peft" / name, base=f"{root}/ours/{name}")
            assert proven.difference < 1e-5 and read_manifest(root / "peft" / name)["proof"]["tensors"] == len(
                proven.names
            )
            jobs.append(
                {
                    "ids": IDS.tolist(),
                    "folder": f"{root}/hf/{name}",
                    "adapter": f"{root}/peft/{name}",
                    "out": f"{root}/said/adapter {name}",
                }
            )
        for name, job in THEIRS.items():
            jobs.append({**about, **job, "folder": f"{root}/theirs/{name}", "out": f"{root}/said/theirs {name}"})
        (root / "said").mkdir()
        (root / "jobs.json").write_text(json.dumps(jobs))
        done = subprocess.run(
            [python, str(PEER), str(root / "jobs.json")], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]

    def theirs(self, name: str) -> tuple[np.ndarray, dict[str, Any]]:
        out = self.root / "said" / name
        return np.load(out.with_suffix(".npz"))["scores"], json.loads(out.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory, parity_python) -> World:
    return World(tmp_path_factory.mktemp("world"), parity_python)


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(0)] if 0 in ids else ids


def bits(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every stored tensor: type, shape, bytes."""
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
def test_our_models_in_transformers(world, name):
    found, said = world.theirs(f"ours {name}")
    np.testing.assert_allclose(found, world.scores[name], atol=1e-4, rtol=0)
    assert until_end(said["answer"]) == world.answers[name]
    assert len(set(world.answers[name])) > 1 or name == "opt norms after"  # without a last norm it repeats itself
    assert said["class"] == find_model_class(read_config(world.root / "ours" / name)).__name__
    assert said["dtype"] == "torch.float32"
    assert world.proofs[name].difference < 1e-6


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma", "opt", "bloom", "gptj"])
def test_the_tokenizer_and_template_come_along(world, name):
    said = world.theirs(f"ours {name}")[1]
    here = load_tokenizer(str(world.root / "ours" / name))
    assert said["token_ids"] == [list(here(text)["input_ids"]) for text in TEXTS]
    assert said["decoded"] == TEXTS
    assert said["prompt"] == "<|user|>How far?<|assistant|>"


def test_a_sentencepiece_model_alone(world):
    said = world.theirs(f"ours {PIECES}")[1]
    here = load_tokenizer(str(world.root / "ours" / PIECES))
    assert said["token_ids"] == [list(here(text)["input_ids"]) for text in TEXTS]
    assert (world.root / "hf" / PIECES / "tokenizer.model").exists()


@pytest.mark.parametrize("name", OURS)
def test_there_and_back_every_bit_is_the_same(world, name, tmp_path):
    back = tmp_path / "back"
    convert(world.root / "hf" / name, back, "paddle", ConvertOptions(proof=False))
    before, after = bits(world.root / "ours" / name), bits(back)
    computed = {key for key in before if ".attn.bias" in key or ".masked_bias" in key}
    copies = {"lm_head.weight", "lm_head.decoder_weight"} if read_config(back).tie_word_embeddings else set()
    if "fused" in name:
        again = tmp_path / "again"
        convert(back, again, "hf", ConvertOptions(proof=False))
        assert bits(again) == bits(world.root / "hf" / name)
        return
    assert before.keys() - after.keys() <= computed | copies
    assert all(before[key] == value for key, value in after.items())


def test_what_is_written(world):
    folder = world.root / "hf" / "llama"
    content = json.loads((folder / "config.json").read_text())
    assert content["architectures"] == ["LlamaForCausalLM"] and content["torch_dtype"] == "float32"
    assert not {"dtype", "alibi", "rope_scaling_type", "paddlenlp_version", "fuse_attention_qkv", "seq_length"} & set(
        content
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = bits(folder)
    assert set(index["weight_map"]) == set(stored) and len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in stored.values())
    q = load_file(world.root / "ours" / "llama" / "model.safetensors")["llama.layers.1.self_attn.k_proj.weight"]
    assert stored["model.layers.1.self_attn.k_proj.weight"][1:] == (q.T.shape, np.ascontiguousarray(q.T).tobytes())
    with open(folder / index["weight_map"]["lm_head.weight"], "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"] == {"format": "pt"}
    manifest = read_manifest(folder)
    assert manifest["source"]["layout"] == "np" and manifest["proof"]["difference"] < 1e-6
    assert "lm_head.weight" not in bits(world.root / "hf" / "llama tied")
    assert changed_files(folder) == []
    assert not any(folder.glob("*.pdparams"))


# from transformers to Paddle


@pytest.mark.parametrize("name", THEIRS)
def test_their_models_in_paddle(world, name, tmp_path):
    source = world.root / "theirs" / name
    options = ConvertOptions(allow_pickle="pickle" in name)
    proof = convert(source, tmp_path / "paddle", "paddle", options).proof
    assert proof.difference < 1e-6
    found, said = world.theirs(f"theirs {name}")
    model = loaded(tmp_path / "paddle")
    np.testing.assert_allclose(scores(model), found, atol=1e-4, rtol=0)
    assert answer(model) == until_end(said["answer"])
    if "pickle" not in name:
        convert(tmp_path / "paddle", tmp_path / "hf", "hf", ConvertOptions(proof=False))
        assert bits(tmp_path / "hf") == bits(source)
        if "bfloat16" not in name:  # and as it stands, without conversion
            np.testing.assert_allclose(scores(loaded(source)), found, atol=1e-4, rtol=0)
    dtype = "bfloat16" if "bfloat16" in name else "float32"
    assert {kind for kind, _, _ in bits(tmp_path / "paddle").values()} == {dtype}


# adapters


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_reads_our_adapters(world, name):
    found, _ = world.theirs(f"adapter {name}")
    ours = scores(loaded(world.root / "ours" / name, world.root / "adapter" / name))
    np.testing.assert_allclose(found, ours, atol=1e-4, rtol=0)
    assert np.abs(found - world.theirs(f"ours {name}")[0]).max() > 0.1
    stored = load_file(world.root / "peft" / name / "adapter_model.safetensors")
    content = json.loads((world.root / "peft" / name / "adapter_config.json").read_text())
    assert content["peft_type"] == "LORA" and content["base_model_name_or_path"] == f"{world.root}/ours/{name}"
    assert {key.split(".")[-3] for key in stored} == set(content["target_modules"])
    if name == "llama fused":
        assert {"q_proj", "v_proj", "up_proj"} <= set(content["target_modules"])


def test_an_adapter_that_adds_something_else_is_not_written(world, monkeypatch, tmp_path):
    name = next(iter(ADAPTERS))
    own = peft._config
    monkeypatch.setattr(peft, "_config", lambda *about: own(*about) | {"r": 2 * own(*about)["r"]})
    with pytest.raises(ModelError, match="would be changed by other values"):
        export_peft(world.root / "adapter" / name, tmp_path / "out", base=f"{world.root}/ours/{name}")
    assert not list(tmp_path.iterdir())
