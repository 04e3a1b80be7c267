"""Fixtures of the parity tests."""

from __future__ import annotations

from pathlib import Path

import paddle
import pytest
from paddlenlp.transformers import Qwen2Config, Qwen2ForCausalLM

from helpers import make_adapter, make_norms_and_biases_nontrivial, make_tiny_model
from support.merge_models import SMALL, save_as_hugging_face


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    paddle.seed(3)
    config = Qwen2Config(**SMALL, tie_word_embeddings=True, architectures=["Qwen2ForCausalLM"])
    qwen = make_norms_and_biases_nontrivial(Qwen2ForCausalLM(config))
    qwen.save_pretrained(str(folder / "qwen2-tied"), safe_serialization=True)
    llama = make_tiny_model(folder / "llama")
    return {
        "llama": llama,
        "qwen2-tied": folder / "qwen2-tied",
        "llama-hf": save_as_hugging_face(llama, folder / "llama-hf", "llama"),
        "qwen2-hf": save_as_hugging_face(folder / "qwen2-tied", folder / "qwen2-hf", "qwen2"),
    }


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory) -> Path:
    """An adapter of the Llama; read-only."""
    return make_adapter(bases["llama"], tmp_path_factory.mktemp("adapter") / "lora")
