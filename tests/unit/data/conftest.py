"""Fixtures of the data tests."""

from __future__ import annotations

import pytest

from oarlock.data.tokenizers.load import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(str(tiny_tokenizer))
