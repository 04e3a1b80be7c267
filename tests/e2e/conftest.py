"""One server for all tests that need one; the last of them (test_serving_stop.py) stops it."""

from __future__ import annotations

import signal

import openai
import pytest

from helpers import make_adapter, make_tiny_model
from oarlock.export.triton import export_triton
from serving import CONTEXT, ENDLESS, GUARD_S, KEY, GrpcStream, Server


@pytest.fixture(scope="session")
def served_model(tmp_path_factory):
    """A random model with many layers and a long context, so that answers can be endless."""
    return make_tiny_model(
        tmp_path_factory.mktemp("served") / "model", max_position_embeddings=CONTEXT, num_hidden_layers=12
    )


@pytest.fixture(scope="session")
def served_adapter(served_model, tmp_path_factory):
    return make_adapter(served_model, tmp_path_factory.mktemp("adapter") / "lora", std=0.5)


@pytest.fixture(scope="session")
def repository(served_model, served_adapter, tmp_path_factory):
    return export_triton(
        served_model, {"pirate": served_adapter}, tmp_path_factory.mktemp("export") / "repository"
    ).folder


@pytest.fixture(scope="session")
def server(repository, tmp_path_factory):
    place = tmp_path_factory.mktemp("server")
    (place / "keys").write_text(f"# for the tests\nanother\n{KEY}\n")
    (place / "keys").chmod(0o600)
    words = ["--api-key-file", str(place / "keys"), "--max-batch", "4", "--max-queue", "40", "--max-body", "100000"]
    words += ["--max-tokens", str(ENDLESS["max_tokens"]), "--drain-seconds", str(GUARD_S)]
    running = Server(repository, place / "log", tuple(words), KEY)
    try:
        running.wait_ready()
        yield running
    finally:
        if running.process.poll() is None:
            running.stop(signal.SIGTERM)
        print(running.said())


@pytest.fixture(scope="session")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=GUARD_S)


@pytest.fixture(scope="session")
def stream(server):
    made = GrpcStream(server)
    yield made
    made.close()
