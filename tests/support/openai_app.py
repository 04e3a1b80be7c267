"""The OpenAI-compatible endpoint without a model behind it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import ClassVar

import pytest
from starlette.testclient import TestClient

from oarlock.serve.front.options import FrontOptions
from oarlock.serve.openai import app
from oarlock.serve.openai.app import make_openai_app
from oarlock.serve.triton.client import Part

HI = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
PYDANTIC = ("Input should", "valid dictionary", "Extra inputs", "Field required", "extra_forbidden", "pydantic", "JSON decode error", "parsing the body")  # fmt: skip


class Recorder:
    """In the place of a model: keeps what it is asked."""

    asked: ClassVar[list[tuple[dict, int | None]]] = []

    def __init__(self, upstream, model):
        self.asked.clear()

    async def close(self):
        pass

    async def adapters(self):
        return []

    async def ask(self, values, default_tokens=None):
        self.asked.append((values, default_tokens))
        yield Part("ho", "stop", 3, 1)


@contextlib.contextmanager
def open_app() -> Iterator[TestClient]:
    """A client of the endpoint, whose model is a Recorder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "TritonClient", Recorder)
        with TestClient(make_openai_app(FrontOptions("", "", "oarlock", ("oarlock",)), None)) as client:
            yield client


def chat(api, **fields):
    """Of an answered request: what the model was asked. Of a refused one: the error."""
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
