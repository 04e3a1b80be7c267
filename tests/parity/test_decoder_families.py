"""Every family of our decoder compared with transformers: logits, gradients, answers, conversion, LoRA, serving.

transformers makes the models (norms not 1, biases not 0) and answers for all of them in one process (decoder_peer.py).
The figures of docs/families.md are printed by `python tests/parity/decoder_table.py`.
"""

from __future__ import annotations

import json
import subprocess
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import paddlenlp.transformers
import pytest
from safetensors.numpy import load_file, save_file
from test_convert import read_bits
from test_engine_answers import ask

from helpers import logits_of, make_tiny_tokenizer
from oarlock.data.examples.collate import Arrays, FinetuneCollator, PackCollator
from oarlock.data.examples.labels import IGNORE_INDEX, Example
from oarlock.export.convert import ConvertOptions, convert
from oarlock.export.static_graph import write_graph
from oarlock.families.registry import FAMILIES
from oarlock.merge.inputs import AdapterMix
from oarlock.merge.merge import merge
from oarlock.model_config.load import read_config
from oarlock.models.build import ModelSource, build_model
from oarlock.models.generate import generate_ids
from oarlock.models.packing import adapt_attention_mask
from oarlock.peft.adapter_folder import Base, save_adapter
from oarlock.peft.lora import LoRA
from oarlock.peft.method import trainable_parameters
from oarlock.sampling.params import SamplingParams
from oarlock.serve.config import EngineConfig
from oarlock.serve.engine import loading
from oarlock.serve.engine.engine import Engine
from oarlock.serve.engine.fused_decoder import FusedDecoder
from oarlock.train.step.loss import TokenCrossEntropy, count_trained_tokens
from oarlock.weights.layout import parameter_shards
from oarlock.weights.safetensors_file import TensorSource
from oarlock.weights.save import save_config
from support.tiny_configs import TINY_CONFIGS

PEER = Path(__file__).with_name("decoder_peer.py")
RANDOM = np.random.default_rng(3)
# Longer than the windows of the tiny models.
TEXTS = [RANDOM.integers(1, 512, length).tolist() for length in (3, 21, 9, 14)]
PROMPTS = [RANDOM.integers(1, 512, length).tolist() for length in (5, 19)]
NEW_TOKENS = 64
ENDLESS = SimpleNamespace(eos_token_id=10**6, pad_token_id=0, bos_token_id=0)
EXAMPLES = [Example(text, [*text[1:], IGNORE_INDEX], False) for text in TEXTS]
BATCHES: dict[str, Arrays] = {
    "padded": FinetuneCollator(512, 0)(EXAMPLES),
    "packed": PackCollator(512, 0)([tuple(EXAMPLES)]),
}
PADDLENLP = ("llama", "qwen2", "mistral", "gemma")  # whose folders it reads
UNFUSED = ("phi3", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")
METHOD = LoRA(r=4, alpha=6.0)
SHORT = RANDOM.integers(1, 512, (2, 6))  # within the windows, which its models do not have


class Case:
    """A model on both sides.

    Args:
        name: of the configuration.
        folder: what the peer wrote into.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.hf, self.paddle = name, folder / name, folder / f"{name}-paddle"
        self.family = FAMILIES[TINY_CONFIGS[name]["model_type"]]
        self.theirs = np.load(folder / f"{name}.npz")
        self.answers = [self.theirs[f"answer {i}"].tolist() for i in range(len(PROMPTS))]

    @cached_property
    def model(self) -> Any:
        model = self.build()
        model.eval()
        return model

    @cached_property
    def adapted(self) -> Any:
        """The model with an adapter that two steps trained."""
        model = self.build(method=METHOD, seed=1)
        trained = [parameter.tensor for parameter in trainable_parameters(model)]
        optimizer, losses = paddle.optimizer.AdamW(0.05, parameters=trained), []
        for _ in range(2):
            _, loss = self.compute_loss(model, BATCHES["packed"])
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
            losses.append(float(loss))
        assert losses[1] < losses[0]
        model.eval()
        return model

    @cached_property
    def adapter(self) -> Path:
        """The folder of the adapter."""
        folder, trained = self.hf.with_name(f"{self.name}-adapter"), trainable_parameters(self.adapted)
        folder.mkdir()
        tensors = [TensorSource(p.name, "float32", p.slice.shape, p.tensor.numpy) for p in trained]
        save_adapter(tensors, METHOD, Base.from_folder(str(self.hf), self.hf), None, None, folder)
        return folder

    def build(self, **about: Any) -> Any:
        return build_model(ModelSource(self.hf, read_config(self.hf), from_weights=True), **about)

    def compute_loss(self, model: Any, arrays: Arrays) -> tuple[np.ndarray, paddle.Tensor]:
        """Logits and loss, as the trainer has them."""
        batch = {name: paddle.to_tensor(array) for name, array in arrays.items() if name != "num_tokens"}
        labels, criterion = batch.pop("labels"), TokenCrossEntropy()
        criterion.normalizer = count_trained_tokens(labels)
        outputs = model(**adapt_attention_mask(batch, model))
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return logits.numpy(), criterion(logits, labels)

    def compute_gradients(self, loss: paddle.Tensor, folder: Path) -> dict[str, np.ndarray]:
        """By the names and in the layout of transformers' files: as a model of gradients is converted."""
        self.model.clear_gradients()
        loss.backward()
        found = {}
        for parameter in parameter_shards(self.model):
            gradient = parameter.tensor.grad  # None for experts that no token went to
            zeros = np.zeros(parameter.slice.shape, np.float32)
            found[parameter.name] = zeros if gradient is None else gradient.numpy()
        (folder / "gradients").mkdir()
        save_config(self.model.config, folder / "gradients")
        save_file(found, folder / "gradients" / "model.safetensors", {"format": "np"})
        convert(folder / "gradients", folder / "converted", "hf", ConvertOptions(proof=False))
        return load_file(folder / "converted" / "model.safetensors")


@pytest.fixture(scope="module")
def peers(tmp_path_factory, parity_python) -> Path:
    """The folder with every model of theirs, and what they gave."""
    folder = tmp_path_factory.mktemp("peers")
    common = {"noise": 0.3, "texts": TEXTS, "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    jobs = [
        common | {"folder": f"{folder}/{name}", "out": f"{folder}/{name}.npz", "make": config}
        for name, config in TINY_CONFIGS.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [parity_python, str(PEER), str(folder / "jobs.json")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module", params=TINY_CONFIGS)
def case(request, peers) -> Case:
    return Case(request.param, peers)


def largest_difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative to the largest number that is wanted."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / (np.abs(wanted).max() or 1.0))


@pytest.mark.parametrize("operators", ["fused_ops", "paddles_own_ops"])
@pytest.mark.parametrize("how", BATCHES)
def test_logits_and_gradients_equal_transformers(case, how, operators, request, tmp_path, record_property):
    request.getfixturevalue(operators)
    logits, loss = case.compute_loss(case.model, BATCHES[how])
    text = BATCHES[how]["labels"] != IGNORE_INDEX
    logits_differ = float(np.abs(logits - case.theirs[how])[text].max())
    record_property("logits", logits_differ)
    gradients = case.compute_gradients(loss, tmp_path)
    wanted = load_file(case.hf / "gradients" / how / "model.safetensors")
    assert gradients.keys() == wanted.keys()
    differences = {name: largest_difference(gradients[name], wanted[name]) for name in wanted}
    record_property("gradients", max(differences.values()))
    assert logits_differ <= 1e-4
    assert max(differences.values()) <= 1e-4, sorted(differences.items(), key=lambda pair: -pair[1])[:5]


def test_answers_equal_transformers(case):
    """Ours answers prompts of two lengths in one batch, transformers one prompt at a time."""
    assert generate_ids(case.model, ENDLESS, PROMPTS, NEW_TOKENS) == case.answers
    assert case.answers[0] != case.answers[1] and all(len(set(answer)) > 1 for answer in case.answers)


@pytest.mark.parametrize("way", ["generic", "fused"])
def test_engine_answers_equal_transformers(case, way, monkeypatch):
    """Rows of the same batch that use an adapter are answered as by the model it was trained on."""
    if way == "generic":
        monkeypatch.setattr(loading, "explain_not_fused", lambda *_: "the test says so")
    make_tiny_tokenizer(case.hf)
    # (The fused decoder has no adapters of packed projections.)
    names = [None] if (case.name, way) == ("glm4", "fused") else [None, "trained"]
    model = loading.open_served_model(case.hf, {name: case.adapter for name in names if name})
    assert isinstance(model.decoder, FusedDecoder) == (way == "fused" and case.name not in UNFUSED)
    engine = Engine(model, EngineConfig())
    try:
        sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
        answers = ask(engine, PROMPTS * len(names), sampling, [name for name in names for _ in PROMPTS])
    finally:
        engine.close()
    by_adapter = generate_ids(case.adapted, ENDLESS, PROMPTS, NEW_TOKENS)
    wanted = (case.answers + by_adapter)[: len(answers)]
    assert [answer.token_ids for answer in answers] == wanted, [answer.error for answer in answers]
    assert by_adapter != case.answers


def test_conversion_both_ways_is_bit_identical(case, tmp_path, record_property):
    proof = convert(case.hf, case.paddle, "paddle").proof
    record_property("conversion", proof.difference)
    assert proof.difference < 1e-6
    convert(case.paddle, tmp_path / "hf", "hf", ConvertOptions(proof=False))
    assert read_bits(tmp_path / "hf") == read_bits(case.hf)
    if case.name in PADDLENLP:
        config = read_config(case.paddle)
        if case.name == "gemma":
            config.hidden_act = "gelu"  # which is what PaddleNLP's computes whatever the field says
        ours = build_model(ModelSource(case.paddle, config, from_weights=True))
        model_class = getattr(paddlenlp.transformers, case.family.architecture)
        theirs = model_class.from_pretrained(str(case.paddle), dtype="float32")
        np.testing.assert_allclose(logits_of(theirs, SHORT), logits_of(ours, SHORT), atol=1e-5, rtol=0)


def test_a_trained_adapter_is_merged_and_exported(case, tmp_path, record_property):
    proof = merge(case.hf, AdapterMix.open([case.adapter]), tmp_path / "merged")
    merged = ModelSource(tmp_path / "merged", read_config(tmp_path / "merged"), from_weights=True)
    ids = BATCHES["padded"]["input_ids"]
    difference = largest_difference(logits_of(build_model(merged), ids), logits_of(case.adapted, ids))
    record_property("LoRA", difference)
    assert difference < 1e-5 < 1e-2 < proof.effect
    (tmp_path / "graph").mkdir()
    graph = write_graph(merged, tmp_path / "graph")
    record_property("export", graph.difference)
    assert graph.difference < 1e-5
