"""Packed examples have the same logits, loss and gradients as alone; a packed run resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddlenlp.transformers
import pytest

from helpers import make_flags, read_rows
from oarlock.config import FinetuneConfig, LoadedConfig, load_config
from oarlock.config.finetune import FinetuneDataSection
from oarlock.data.examples.collate import Arrays, FinetuneCollator, PackCollator
from oarlock.data.examples.dataset import ExampleDataset, load_finetune_data
from oarlock.data.examples.labels import IGNORE_INDEX, Example
from oarlock.data.examples.packing import PackedDataset
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.errors import ConfigError
from oarlock.models import packing
from oarlock.models.packing import ENDS
from oarlock.ops.attention_backends import masks
from oarlock.train.finetune import finetune
from oarlock.train.step.loss import TokenCrossEntropy, count_trained_tokens

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2, "use_cache": False, "use_flash_attention": False,
    "use_fast_layer_norm": False, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama-grouped": ("Llama", {"num_key_value_heads": 2}),
    "llama-dynamic-ntk": ("Llama", {"rope_scaling_type": "dynamic_ntk", "rope_scaling_factor": 2.0}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "mistral": ("Mistral", {"num_key_value_heads": 2}),
    "gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 8}),
    "chatglm_v2": (
        "ChatGLMv2",
        {
            "padded_vocab_size": 96,
            "ffn_hidden_size": 64,
            "kv_channels": 8,
            "multi_query_group_num": 2,
            "seq_length": 64,
        },
    ),
}


def make_examples(count: int = 12) -> list[Example]:
    random = np.random.RandomState(3)
    found = []
    for _ in range(count):
        length = int(random.randint(2, 20))
        prompt = int(random.randint(0, length))
        ids = random.randint(1, 96, length + 1).tolist()
        found.append(Example(ids[:-1], [IGNORE_INDEX] * prompt + ids[prompt + 1 :], False))
    return found


BLOCK = 16
EXAMPLES = make_examples()
PACKED = PackedDataset(ExampleDataset(EXAMPLES), 30, seed=1)


@pytest.fixture(scope="module", params=[*MODELS, "llama-grouped in blocks", "qwen2 in blocks"])
def model(request) -> Any:
    """A model with attention in blocks of at most BLOCK tokens; no example is longer."""
    kind, _, blocks = request.param.partition(" ")
    name, changes = MODELS[kind]
    paddle.seed(11)
    config = getattr(paddlenlp.transformers, f"{name}Config")(**(SIZES | changes))
    found = getattr(paddlenlp.transformers, f"{name}ForCausalLM")(config)
    for parameter in found.parameters():  # some classes leave a random model near zero
        if len(parameter.shape) == 2:
            parameter.set_value(paddle.randn(parameter.shape) * 0.2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(masks, "_BLOCK", BLOCK)
        if blocks:
            packing.attend_in_blocks(found)
        yield found


def run(model: Any, arrays: Arrays) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Logits, loss and gradients."""
    batch = {name: paddle.to_tensor(array) for name, array in arrays.items() if name != "num_tokens"}
    labels = batch.pop("labels")
    criterion = TokenCrossEntropy()
    criterion.normalizer = count_trained_tokens(labels)
    outputs = model(**packing.adapt_attention_mask(batch, model))
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    loss = criterion(logits, labels)
    model.clear_gradients()
    loss.backward()
    return logits.numpy(), float(loss), {name: p.grad.numpy() for name, p in model.named_parameters()}


def run_alone(model: Any) -> tuple[dict[int, np.ndarray], float, dict[str, np.ndarray]]:
    logits, loss, gradients = run(model, FinetuneCollator(96, 0)(EXAMPLES))
    return {i: logits[i, : len(example.input_ids)] for i, example in enumerate(EXAMPLES)}, loss, gradients


def packed_arrays() -> Arrays:
    return PackCollator(96, 0, multiple_of=32)([PACKED[i] for i in range(len(PACKED))])


def cut_out(logits: np.ndarray) -> dict[int, np.ndarray]:
    """The logits of each example."""
    found = {}
    for row in range(len(PACKED)):
        start = 0
        for member in PACKED.packs[row]:
            stop = start + len(EXAMPLES[member].input_ids)
            found[int(member)] = logits[row, start:stop]
            start = stop
    return found


def difference(found: dict[int, np.ndarray], expected: dict[int, np.ndarray]) -> float:
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[i] - expected[i]).max()) for i in expected)


def test_packed_examples_equal_unpacked_ones(model):
    arrays = packed_arrays()
    assert max(len(PACKED[i]) for i in range(len(PACKED))) > 2
    filled = [row[:count] for row, count in zip(arrays[ENDS], arrays["num_tokens"], strict=True)]
    held = [len(set(row[start:stop])) for row in filled for start, stop in masks.split_row(row)]
    assert 2 in held and len(held) > len(PACKED)  # blocks of several examples, and rows of several blocks
    expected_logits, expected_loss, expected_gradients = run_alone(model)
    logits, loss, gradients = run(model, arrays)
    assert difference(cut_out(logits), expected_logits) <= 1e-5 * max(np.abs(a).max() for a in expected_logits.values())
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, expected in expected_gradients.items():
        assert np.abs(gradients[name] - expected).max() <= 1e-5 * np.abs(expected).max(), name


def test_the_comparison_detects_leaks_between_examples(model):
    """The same comparison with one fault at a time."""
    expected = run_alone(model)[0]
    arrays = packed_arrays()
    one_late = arrays[ENDS].copy()
    starts = (arrays["position_ids"] == 0).nonzero()
    one_late[one_late < 32] += 1  # the first token of an example attends to the one before it
    assert len(starts[0]) > len(arrays[ENDS])
    mistakes = [
        {ENDS: np.full_like(arrays[ENDS], 32)},
        {"position_ids": arrays["position_ids"] // 2},  # (a shift changes nothing under rotary positions)
    ]
    if not getattr(model, "attends_in_blocks", False):  # blocks are cut where the ends change
        mistakes.append({ENDS: one_late})
    for wrong in mistakes:
        assert difference(cut_out(run(model, arrays | wrong)[0]), expected) > 1e-2


# through the trainer


@pytest.fixture(scope="module")
def short_answers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("short")
    counts = np.random.RandomState(0).randint(1, 25, 90).tolist()
    records = [{"src": f"count to {n}", "tgt": " ".join(["word"] * n)} for n in counts]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "dev.jsonl").write_text("\n".join(map(json.dumps, records[:7])))
    return folder


def tuned(model: Path, data: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    options = {
        "model_name_or_path": model, "dataset_name_or_path": data, "output_dir": output, "do_train": 1, "do_eval": 1,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "learning_rate": 1e-2,
        "src_length": 32, "tgt_length": 64, "save_steps": 3, "logging_steps": 1, "eval_steps": 3, "report_to": "none",
        "device": "cpu", "disable_tqdm": 1, "log_level": "error", "packing": 1,
    }  # fmt: skip
    assert finetune(LoadedConfig(load_config(FinetuneConfig, make_flags(**(options | changes))).config)) == 0
    return read_rows(output / "metrics.jsonl")


def numbers(found: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(row.get(name) for name in ("step", "samples", "loss", "grad_norm", "eval_loss")) for row in found]


def test_a_packed_run_resumes_exactly(tmp_path, tiny_model, short_answers, capsys):
    """With another batch size: the position counts packs."""
    whole = tuned(tiny_model, short_answers, tmp_path / "whole")
    assert "packing: 90 examples in" in capsys.readouterr().out
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "parts" / "checkpoint-3")
    (tmp_path / "parts" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    again = tuned(tiny_model, short_answers, tmp_path / "parts")
    assert "resuming from" in capsys.readouterr().out
    assert numbers(again) == numbers(whole) and again[-1]["samples" if "samples" in again[-1] else "step"]
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "parts" / "checkpoint-3").rename(other / "checkpoint-3")
    wide = tuned(tiny_model, short_answers, other, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    losses = {row["step"]: row["loss"] for row in whole if "loss" in row}
    assert [row["samples"] for row in wide if "loss" in row] == [16, 20, 24]
    for row in wide:
        if "loss" in row:
            assert row["loss"] == pytest.approx(losses[row["step"]], rel=1e-5)
    unpacked = tuned(tiny_model, short_answers, tmp_path / "plain", packing=0, max_steps=1, learning_rate=1e-9)
    ours = tuned(tiny_model, short_answers, tmp_path / "packed", max_steps=1, learning_rate=1e-9)
    assert ours[-1]["eval_tokens"] == unpacked[-1]["eval_tokens"]
    assert ours[-1]["eval_loss"] == pytest.approx(unpacked[-1]["eval_loss"], rel=1e-6)


def test_an_epoch_of_packs_equals_an_epoch_of_examples(tmp_path, tiny_model, short_answers):
    """With the whole data in one step: loss and gradient norm equal those of the unpacked step."""
    common = {"max_steps": 1, "gradient_accumulation_steps": 1, "save_strategy": "no", "do_eval": 0}
    plain = tuned(tiny_model, short_answers, tmp_path / "a", packing=0, per_device_train_batch_size=90, **common)
    section = FinetuneDataSection(dataset_name_or_path=str(short_answers), src_length=32, tgt_length=64)
    data = load_finetune_data(section, load_tokenizer(str(tiny_model)))
    count = len(PackedDataset(data.train, 256, 42))
    assert count < 30
    common |= {"packing_length": 256, "per_device_train_batch_size": count}
    for name in ("", "full", "full_attn", "core_attn"):
        recompute = {"recompute": 1, "recompute_granularity": name} if name else {}
        found = tuned(tiny_model, short_answers, tmp_path / f"packed{name}", **common, **recompute)
        assert found[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6), name
        assert found[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-5), name


def test_nothing_is_packed_if_no_two_examples_fit(tmp_path, tiny_model, short_answers, capsys):
    common = {"max_steps": 2, "save_strategy": "no", "do_eval": 0}
    packed_run = tuned(tiny_model, short_answers, tmp_path / "a", packing_length=1, **common)
    assert "packs of 1 tokens would be " in capsys.readouterr().out
    plain = tuned(tiny_model, short_answers, tmp_path / "b", packing=0, **common)
    assert numbers(packed_run) == numbers(plain)


def test_a_model_that_mixes_packed_examples_is_refused_before_the_data_is_read(tmp_path, tiny_model):
    folder = tmp_path / "opt"
    folder.mkdir()
    content = {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "hidden_size": 8,
        "num_attention_heads": 2,
        "max_position_embeddings": 96,
    }
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="--packing: PaddleNLP's opt does not take"):
        tuned(folder, tmp_path / "no data", tmp_path / "out")
