"""Shared fixtures: paths, and the tiny model that many tests train or load."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "llm"), str(ROOT / "tests")]

from oarlock.compat import lazy_imports  # noqa: E402
from oarlock.environment import matmul_library  # noqa: E402

# As in every program of the project: before paddlenlp is imported and before any matrix product.
lazy_imports.install()
matmul_library.use_library(matmul_library.choose_library())

from helpers import make_tiny_config, make_tiny_model, make_tiny_tokenizer  # noqa: E402
from oarlock.data.corpus.build_corpus import BuildOptions, build_corpus  # noqa: E402

# No deadline: tests must not depend on how long an example takes.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Give the session its own cache folder, shared by all its tests and deleted at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_config(tmp_path_factory.mktemp("config"))


@pytest.fixture
def fused_ops():
    """Install the fused ops, if they are built, as in a program that has trained before."""
    from oarlock.ops import install

    install.use(True)
    yield
    install.use(False)


@pytest.fixture
def paddles_own_ops():
    """Restore Paddle's own ops before and after a test that installs the fused ones."""
    from oarlock.ops import install

    install.use(False)
    yield
    install.use(False)


@pytest.fixture(scope="session")
def parity_python() -> str:
    """The Python that has torch, transformers and peft (scripts/parity_env.sh, or $OARLOCK_PARITY_PYTHON)."""
    python = Path(os.environ.get("OARLOCK_PARITY_PYTHON") or ROOT / ".venv-parity" / "bin" / "python")
    assert python.exists(), f"{python} is missing: run `bash scripts/parity_env.sh` to create it"
    return str(python)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, tiny_tokenizer) -> Path:
    """A folder with one small corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"document {i}: " + " ".join(str(n) for n in range(i % 60 + 20)) for i in range(600)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    build_corpus(BuildOptions((str(folder / "text.jsonl"),), str(tiny_tokenizer), str(folder / "data" / "c")))
    return folder / "data"
