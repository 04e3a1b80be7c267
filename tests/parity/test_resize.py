"""A grown embedding: old tokens keep their logits, new rows are the mean of the old ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import AddedToken

from families import FAMILIES, family_model
from helpers import logits_of, make_tiny_tokenizer
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.errors import ConfigError, ModelError
from oarlock.model_config.load import read_config
from oarlock.models.build import ModelSource, build_model, check_vocabulary
from oarlock.models.resize import resize_embedding

NEW = ["<|tool|>", "<|call|>", "<|end|>"]


def make_model_and_tokenizer(folder: Path, family: str, **changes) -> tuple[Path, Path]:
    """A model folder, and a tokenizer with three more tokens than its own."""
    model = family_model(family, **changes)
    model.save_pretrained(str(folder), safe_serialization=True)
    make_tiny_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    tokenizer = load_tokenizer(str(folder))
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in NEW])
    tokenizer.save_pretrained(folder.parent / "tokenizer")
    return folder, folder.parent / "tokenizer"


def compute_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    model = build_model(ModelSource(folder, read_config(folder), from_weights=True))
    return logits_of(model, ids)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in FAMILIES if family not in ("chatglm", "glm")),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"intermediate_size": 512}),  # another dimension of the size of the vocabulary
    ],
    ids=str,
)
def test_logits_of_old_tokens_do_not_change(tmp_path, family, changes):
    model, tokenizer = make_model_and_tokenizer(tmp_path / "model", family, **changes)
    assert resize_embedding(model, str(tokenizer), tmp_path / "grown") == 576
    ids = np.random.default_rng(0).integers(0, 512, [2, 12])
    before, after = compute_logits(model, ids), compute_logits(tmp_path / "grown", ids)
    np.testing.assert_allclose(after[..., :512], before, atol=1e-6, rtol=1e-6)
    assert after.shape[-1] == 576
    np.testing.assert_allclose(after[..., 512:], before.mean(-1, keepdims=True).repeat(64, -1), atol=1e-4)
    assert np.isfinite(compute_logits(tmp_path / "grown", np.full([1, 4], 514))).all()


def test_files_copied_by_resize(tmp_path, capsys):
    model, tokenizer = make_model_and_tokenizer(tmp_path / "model", "llama")
    resize_embedding(model, str(tokenizer), tmp_path / "grown", multiple_of=1)
    weights, old = (load_file(tmp_path / name / "model.safetensors") for name in ("grown", "model"))
    name = "llama.embed_tokens.weight"
    np.testing.assert_array_equal(weights[name][:512], old[name])
    np.testing.assert_allclose(weights[name][512:], old[name].mean(0)[None].repeat(3, 0), rtol=1e-5, atol=1e-8)
    assert all((weights[key] == old[key]).all() for key in old if old[key].shape == weights[key].shape)
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["vocab_size"] == 515
    assert (tmp_path / "grown" / "generation_config.json").read_text() == '{"eos_token_id": [0, 2]}'
    found = load_tokenizer(str(tmp_path / "grown"))
    assert found("<|call|>")["input_ids"] == [513] and found.init_kwargs["chat_template"]
    assert "512 rows became 515 (llama.embed_tokens.weight, lm_head.weight), for 515 tokens" in capsys.readouterr().out


def test_refusals(tmp_path):
    model, tokenizer = make_model_and_tokenizer(tmp_path / "model", "llama")
    source = ModelSource(model, read_config(model), from_weights=True)
    with pytest.raises(
        ConfigError, match=r"needs a vocabulary of 515, but the model's has 512 .* 3 token\(s\) were added"
    ) as error:
        check_vocabulary(source, 515, "the tokenizer", str(tokenizer))
    assert f"oarlock resize --input {model} --tokenizer {tokenizer} --output" in str(error.value)
    with pytest.raises(ModelError, match="there is nothing to add"):
        resize_embedding(model, str(model), tmp_path / "grown")
    assert not (tmp_path / "grown").exists()
    with pytest.raises(ModelError, match="is not empty"):
        resize_embedding(model, str(tokenizer), tokenizer)
