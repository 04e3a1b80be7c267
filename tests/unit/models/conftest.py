"""Fixtures of the model tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers import make_tiny_model
from oarlock.export.convert import ConvertOptions, convert


@pytest.fixture(scope="module")
def paddle_model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("paddle"))


@pytest.fixture(scope="module")
def model(paddle_model, tmp_path_factory) -> Path:
    """A model in Hugging Face's layout; read-only."""
    convert(paddle_model, output := tmp_path_factory.mktemp("hf") / "m", "hf", ConvertOptions(proof=False))
    return output


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(model, tmp_path / "m")
