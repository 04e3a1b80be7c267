"""generation_config.json and lists of end tokens are carried through every step and honoured in every answer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import make_flags, make_tiny_model, run_program
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.export.convert import ConvertOptions, convert
from oarlock.model_config.load import read_config
from oarlock.models.generate import ask_model
from oarlock.models.load_finetuned import load_finetuned
from oarlock.serve.engine.loading import open_served_model
from oarlock.serve.triton.repository import read_chat_temperature
from oarlock.train.checkpoint.inspect import consolidate

SETTINGS = {
    "bos_token_id": 0, "eos_token_id": [0, 302], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "min_p": 0.1,
    "stop_strings": ["x"], "transformers_version": "4.55.0",
}  # fmt: skip
CHAIN = [2, 300, 301, 302, 303, 304, 304]  # what follows <|assistant|>; 302 ends an answer by generation_config.json
RECORDS = [{"instruction": "Say it.", "input": word, "output": word} for word in ("water", "fire")]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model that answers 300 301 302 303 ... to everything."""
    folder = make_tiny_model(tmp_path_factory.mktemp("chain"), eos_token_id=[0, 1])
    arrays, random = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    embedding = random.normal(size=arrays["llama.embed_tokens.weight"].shape).astype("f4")
    head = np.zeros_like(arrays["lm_head.weight"])
    for token, after in itertools.pairwise(CHAIN):
        head[:, after] += embedding[token] / np.linalg.norm(embedding[token]) * 20
    for name, values in arrays.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            arrays[name] = np.zeros_like(values)
        elif name.endswith("norm.weight"):
            arrays[name] = np.ones_like(values)
    arrays |= {"llama.embed_tokens.weight": embedding, "lm_head.weight": head}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "np"})
    (folder / "generation_config.json").write_text(json.dumps(SETTINGS))
    return folder


def settings(folder: Path) -> dict:
    return json.loads((folder / "generation_config.json").read_text())


def test_generation_settings_apply_to_ask_and_serve(base):
    tokenizer = load_tokenizer(str(base))
    assert load_finetuned(str(base)).ends == (0, 1, 302)
    said = tokenizer.decode([300, 301]).strip()
    assert [answer for _, answer in ask_model(str(base), ["a", "b"], 8)] == [said, said]
    served = open_served_model(base, {})
    assert served.ends == {0, 1, 302} and served.defaults == {"temperature": 0.6, "top_p": 0.9}


def test_the_default_temperature_of_a_repository(base, tmp_path):
    model = tmp_path / "oarlock" / "1" / "model"
    model.mkdir(parents=True)
    assert read_chat_temperature(tmp_path) == 1.0
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.3}))
    assert read_chat_temperature(tmp_path) == 0.3


def test_through_training_checkpoints_and_conversion(base, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train.json", "dev.json"):
        (tmp_path / "data" / name).write_text(json.dumps(RECORDS))
    words = make_flags(
        model_name_or_path=base, dataset_name_or_path=tmp_path / "data", output_dir=tmp_path / "out", max_steps=1,
        learning_rate=1e-9, per_device_train_batch_size=2, src_length=32, tgt_length=16, do_train=1, do_eval=1,
        do_generation=1, eval_steps=1, report_to="none", device="cpu",
    )  # fmt: skip
    result = run_program("finetune_generation.py", *words)
    assert result.returncode == 0, result.stderr
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    said = load_tokenizer(str(base)).decode([300, 301]).strip()
    assert {sample["answer"].strip() for sample in samples if "answer" in sample} == {said}
    consolidate(tmp_path / "out" / "checkpoint-1", tmp_path / "whole", 10**9)
    for folder in (tmp_path / "out", tmp_path / "whole"):
        assert settings(folder) == SETTINGS and read_config(folder).eos_token_id == [0, 1]
    convert(tmp_path / "out", tmp_path / "hf", "hf", ConvertOptions(proof=False))
    assert settings(tmp_path / "hf") == SETTINGS | {"pad_token_id": 0}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == [0, 1]
    convert(tmp_path / "hf", tmp_path / "back", "paddle", ConvertOptions(proof=False))
    assert settings(tmp_path / "back").items() >= SETTINGS.items() and read_config(tmp_path / "back").eos_token_id == [
        0,
        1,
    ]
