"""Our models and transformers' models, converted both ways and run on both sides, once for all tests."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle

from families import family_model
from helpers import logits_of, make_tiny_tokenizer
from oarlock.data.embedded.instructions import make_instruction_records
from oarlock.export.convert import ConvertOptions, convert
from oarlock.export.manifest import read_manifest
from oarlock.export.peft import export_peft
from oarlock.model_config.load import find_model_class, read_config
from oarlock.models.build import ModelSource, build_model
from oarlock.models.generate import generate_ids
from oarlock.models.layer_offload import make_empty_model
from oarlock.peft.adapter_folder import Base, save_adapter
from oarlock.peft.lora import LoRA
from oarlock.peft.method import restore_method, trainable_parameters
from oarlock.weights.safetensors_file import TensorSource

PEER = Path(__file__).resolve().parents[1] / "parity" / "transformers_peer.py"
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
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.1,
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 8}  # fmt: skip

# Our models: name -> family and changed fields.
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
    "qwen2 yarn": ("qwen2", {"rope_scaling": YARN}),
    "mistral": ("mistral", {"sliding_window": 64}),  # the texts are shorter
    "gemma": ("gemma", {}),
    "gemma untied": ("gemma", {"tie_word_embeddings": False, "hidden_act": "gelu_pytorch_tanh"}),
    "opt": ("opt", {}),
    "opt norms after": ("opt", {"normalize_before": False}),
    "opt untied": ("opt", {"tie_word_embeddings": False}),
    "bloom": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "gptj": ("gptj", {}),
}  # fmt: skip
PIECES = "llama tied"  # its only tokenizer file is a sentencepiece model
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
# Models of transformers: name -> job for the peer.
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
    "phi3 longrope": {"make": {"model_type": "phi3", **_SIZES, "original_max_position_embeddings": 8, "rope_parameters": {"rope_theta": 1e4, **LONGROPE}}},
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
    if family == "qwen2":  # pre-tokenizes like Qwen2; transformers 5 takes that for granted
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
    """Write a sentencepiece model like Llama's under PaddleNLP's name, without a tokenizer.json."""
    import sentencepiece

    texts = [record["instruction"] + " " + record["output"] for record in make_instruction_records("train")[:300]]
    with open(folder / "sentencepiece.bpe.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=480, model_type="bpe", byte_fallback=True,
            character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')


def make_sensitive(name: str):
    """A model whose logits depend on the whole input."""
    family, changes = OURS[name]
    model = family_model(family, **changes)
    random = np.random.default_rng(5)
    for path, parameter in model.named_parameters():
        if len(parameter.shape) > 1 and "embed" not in path and "wte" not in path and "lm_head" not in path:
            noise = random.normal(0, 0.6, parameter.shape)
            parameter.set_value(parameter + paddle.to_tensor(noise.astype("float32")))
    model.eval()
    return model


def compute_logits(model) -> np.ndarray:
    return logits_of(model, IDS)


def answer(model) -> list[int]:
    return generate_ids(model, SPECIAL, [PROMPT], 32)[0]


def loaded(folder: Path, adapter: Path | None = None):
    settings = json.loads((adapter / "adapter.json").read_text()) if adapter else {}
    method = restore_method(settings["method"], settings["settings"]) if adapter else None
    model = build_model(ModelSource(folder, read_config(folder), True), method=method, adapter=adapter)
    model.eval()
    return model


def make_adapter(base: Path, folder: Path, method: LoRA) -> Path:
    config, random, tensors = read_config(base), np.random.default_rng(1), []
    for parameter in trainable_parameters(make_empty_model(find_model_class(config), config, method)):
        values = (random.standard_normal(parameter.slice.shape) * 0.2).astype(np.float32)
        tensors.append(TensorSource(parameter.name, "float32", values.shape, lambda values=values: values))
    folder.mkdir(parents=True)
    save_adapter(tensors, method, Base.from_folder(str(base), base), None, None, folder)
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
            model, folder = make_sensitive(name), root / "ours" / name
            model.save_pretrained(
                str(folder), safe_serialization=True, max_shard_size="100KB" if "fused" in name else "5GB"
            )
            if name == PIECES:
                make_pieces(folder)
            else:
                make_tokenizer(folder, family)
            self.scores[name], self.answers[name] = compute_logits(model), answer(model)
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
            manifest = read_manifest(root / "peft" / name)
            assert proven.proof.difference < 1e-5 and manifest["proof"]["tensors"] == len(proven.names)
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
