"""The OpenAI-compatible endpoint without a model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import ClassVar

from starlette.testclient import TestClient

from oarlock.serve.config import ServeConfig
from oarlock.serve.front.openai.app import make_openai_app
from oarlock.serve.request import TokenChunk
from oarlock.serve.triton.fields import write_request
from oarlock.triton_repository.inputs import INPUTS

HI = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
PYDANTIC = ("Input should", "valid dictionary", "Extra inputs", "Field required", "extra_forbidden", "pydantic", "JSON decode error", "parsing the body")  # fmt: skip


class Recorder:
    """A stand-in for Triton that records the requested tensors as Python values, and has a default length."""

    asked: ClassVar[list[tuple[dict, int | None]]] = []

    async def list_adapters(self, model):
        return []

    async def generate(self, model, request):
        values = {}
        for name, tensor in write_request(request).items():
            found = [item.decode() if isinstance(item, bytes) else item for item in tensor.tolist()]
            values[name] = found if INPUTS[name].is_list else found[0]
        assert values.pop("stream") is True
        self.asked.append((values, request.sampling.default_tokens))
        yield TokenChunk("ho", (5,), "stop", 3, 1)


@contextlib.contextmanager
def open_app() -> Iterator[TestClient]:
    """A client of an endpoint whose model is a Recorder."""
    Recorder.asked.clear()
    with TestClient(make_openai_app(ServeConfig(), Recorder())) as client:
        yield client


def ask_chat(api, **fields):
    """Return the tensors that the model got, or the error of a refused request."""
    return post(api, "/v1/chat/completions", {"model": "oarlock", "messages": HI, **fields})


def complete(api, **fields):
    return post(api, "/v1/completions", {"model": "oarlock", "prompt": "hi", **fields})


def post(api, path, content):
    Recorder.asked.clear()
    answer = api.post(path, content=content if isinstance(content, (str, bytes)) else json.dumps(content),
                      headers={"Content-Type": "application/json"})  # fmt: skip
    if answer.status_code == 200:
        return Recorder.asked[0][0]
    error = answer.json()["error"]
    assert answer.status_code == 400 and not Recorder.asked
    assert not any(words in error["message"] for words in PYDANTIC), error
    assert set(error) == {"message", "type", "code", "param"} and error["type"] == "invalid_request_error"
    return error
