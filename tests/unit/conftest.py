"""Fixtures of several unit tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def make_engine():
    """build_engine, with every engine closed when the test ends."""
    from scripted_engine import build_engine

    engines = []

    def build(*arguments, **options):
        engines.append(build_engine(*arguments, **options))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close(drain=False)
