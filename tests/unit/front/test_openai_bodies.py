"""Bodies and paths of OpenAI requests, and the model inputs made from valid ones."""

from __future__ import annotations

import json

import pytest
from openai.types.chat import ChatCompletionMessage

from support.openai_app import HI, TOOLS, Recorder, ask_chat, complete, open_app, post


@pytest.fixture(scope="module")
def api():
    with open_app() as client:
        yield client


def test_a_body_that_is_not_a_json_object_is_refused(api):
    for content, words in (
        ("", "no body"),
        ("{", "the request:1: not valid JSON"),
        (b"\xff\xfe\xff", "UTF-16; JSON is read as UTF-8"),
        (b'{"model": "\xff"}', "not UTF-8"),
        ("[" * 100_000, "more than 128 levels deep"),
        ("9" * 5000, "an integer of 5,000 digits"),
        ('{"temperature": NaN}', "NaN is not a JSON number"),
        ('{"temperature": 1e999}', "1e999 is too large for a number"),
        ("[]", "a JSON object; got []"),
        ("null", "a JSON object; got null"),
        ("{}", "model is missing"),
        ('{"model": "oarlock", "temperature": 0, "temperature": 2}', "field 'temperature' appears twice in one object"),
    ):
        assert words in post(api, "/v1/chat/completions", content)["message"], content[:20]


@pytest.mark.parametrize(
    "kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "json", "multipart/form-data"]
)
def test_a_wrong_content_type_is_named(api, kind):
    content = json.dumps({"model": "oarlock", "messages": HI}).encode()
    request = api.build_request("POST", "/v1/chat/completions", content=content)
    request.headers.pop("Content-Type", None)
    if kind is not None:
        request.headers["Content-Type"] = kind
    answer = api.send(request)
    assert answer.status_code == 415 and "Content-Type: application/json" in answer.json()["error"]["message"]
    assert (kind or "it has none") in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "Application/JSON", "application/problem+json"]
)
def test_all_json_content_types_are_accepted(api, kind):
    content = json.dumps({"model": "oarlock", "messages": HI}).encode()
    assert api.post("/v1/chat/completions", content=content, headers={"Content-Type": kind}).status_code == 200


def test_tools_and_tool_calls_reach_the_template(api):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    back = ChatCompletionMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [call]})
    result = {"role": "tool", "tool_call_id": "c1", "content": "sun"}
    asked = ask_chat(api, tools=TOOLS, tool_choice="auto", messages=[*HI, back.model_dump(), result])
    assert json.loads(asked["tools"]) == TOOLS
    _, said, heard = json.loads(asked["messages"])
    assert (
        said["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Bern"}}
        and "content" not in said
    )
    assert heard == result
    assert "tools" not in ask_chat(api, tools=TOOLS, tool_choice="none")
    error = ask_chat(
        api, messages=[*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    )
    assert error["param"] == "messages[1].tool_calls[0].function.arguments" and "not valid JSON" in error["message"]


def test_nesting_is_bounded(api):
    """A template that walks through nested objects must not exhaust the stack."""
    deep: dict = {}
    for _ in range(80):
        deep = {"type": "object", "properties": deep}
    tools = [{"type": "function", "function": {"name": "f", "parameters": deep}}]
    assert ask_chat(api, tools=tools)["message"] == "tools: more than 64 objects in each other"
    arguments = "[" * 90 + "]" * 90
    calls = [{"function": {"name": "f", "arguments": f'{{"a": {arguments}}}'}}]
    error = ask_chat(api, messages=[*HI, {"role": "assistant", "tool_calls": calls}])
    assert error["param"] == "messages[1].tool_calls" and "64 objects" in error["message"]
    calls[0]["function"]["arguments"] = "[" * 100_000
    error = ask_chat(api, messages=[*HI, {"role": "assistant", "tool_calls": calls}])
    assert "messages[1]" in error["message"] or "recursion" in error["message"]


def test_unknown_paths_and_methods_are_refused(api):
    for method, path, status, words in (
        ("POST", "/v1/embeddings", 404, "POST /v1/embeddings: there is no such address here"),
        ("GET", "/v1/chat/completions", 405, "GET /v1/chat/completions: this address takes POST"),
    ):
        answer = api.request(method, path)
        assert (answer.status_code, answer.json()["error"]["message"]) == (status, words)


def test_the_developer_role_is_the_system_role(api):
    asked = ask_chat(api, messages=[{"role": "developer", "content": "Be brief."}, *HI])
    assert json.loads(asked["messages"])[0] == {"role": "system", "content": "Be brief."}


def test_max_tokens_and_its_default(api):
    assert ask_chat(api, max_tokens=9, max_completion_tokens=2)["max_tokens"] == 2
    assert ask_chat(api, max_tokens=9, max_completion_tokens=None)["max_tokens"] == 9
    assert ask_chat(api, max_tokens=9.0)["max_tokens"] == 9
    ask_chat(api)
    assert Recorder.asked[0][1] is None  # as many as fit
    complete(api)
    assert Recorder.asked[0][1] == 16 and "max_tokens" not in Recorder.asked[0][0]  # OpenAI's, as far as it fits


def test_every_prompt_format_is_accepted(api):
    for prompt, count in (("a", 1), ([5, 6], 1), (["a", "b"], 2), ([[5], [6]], 2), (["a", [5]], 2)):
        assert "temperature" in complete(api, prompt=prompt) and len(Recorder.asked) == count, prompt
    assert complete(api, prompt=[5, 6])["input_ids"] == [5, 6]
    parts = [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b", "prompt_cache_breakpoint": {"mode": "explicit"}},
    ]
    assert json.loads(ask_chat(api, messages=[{"role": "user", "content": parts}])["messages"])[0]["content"] == "ab"


def test_the_openapi_schema_lists_every_field(api):
    schemas = api.get("/openapi.json").json()["components"]["schemas"]
    assert {"model", "messages", "max_tokens", "max_completion_tokens"} <= set(schemas["ChatRequest"]["properties"])
    assert "anyOf" in schemas["CompletionRequest"]["properties"]["prompt"]
