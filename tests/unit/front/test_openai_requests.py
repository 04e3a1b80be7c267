"""Requests as OpenAI clients write them: what counts as omitted, and the error messages of refusals."""

from __future__ import annotations

import json
from typing import get_type_hints

import openai
import pytest
from openai.types import completion_create_params
from openai.types.chat import ChatCompletionMessage
from openai.types.chat import completion_create_params as chat_create_params

from support.openai_app import HI, TOOLS, Recorder, ask_chat, complete, open_app


@pytest.fixture(scope="module")
def api():
    with open_app() as client:
        yield client


def test_every_optional_field_may_be_null(api):
    names = set(get_type_hints(chat_create_params.CompletionCreateParamsStreaming)) - {"messages", "model"}
    assert len(names) > 30
    asked = ask_chat(api, **dict.fromkeys(names))
    assert asked == {"messages": json.dumps(HI), "temperature": 1.0}
    names = set(get_type_hints(completion_create_params.CompletionCreateParamsStreaming)) - {"prompt", "model"}
    assert complete(api, **dict.fromkeys(names)) == {"text_input": "hi", "temperature": 1.0}
    assert ask_chat(api, a_field_of_tomorrow=None)["messages"]


def test_empty_defaults_are_absent(api):
    empty = {"tools": [], "functions": [], "logit_bias": {}, "stop": [], "metadata": {}, "modalities": [], "user": "",
             "stop_token_ids": [], "stream_options": {}, "response_format": {}}  # fmt: skip
    off = {"logprobs": False, "top_logprobs": 0, "store": False, "stream": False, "n": 1, "tool_choice": "auto",
           "function_call": "none", "parallel_tool_calls": True, "response_format": {"type": "text"}, "top_k": -1,
           "service_tier": "auto", "modalities": ["text"], "verbosity": "medium", "stream_options": {"include_usage": None}}  # fmt: skip
    assert ask_chat(api, **empty)["temperature"] == 1.0 and "stop" not in ask_chat(api, **empty)
    assert ask_chat(api, **off) == {"messages": json.dumps(HI), "temperature": 1.0, "top_k": 0}
    assert ask_chat(api, stop="")["messages"] and "stop" not in ask_chat(api, stop="")
    off = {"echo": False, "best_of": 1, "logprobs": None, "suffix": "", "logit_bias": {}, "stop": []}
    assert complete(api, **off) == {"text_input": "hi", "temperature": 1.0}
    assert "best_of" not in complete(api, best_of=2, n=2) and complete(api, best_of=2)["param"] == "best_of"


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"refusal": None, "annotations": []},
        {"refusal": None, "tool_calls": None, "function_call": None, "audio": None, "annotations": []},
        {"tool_calls": [], "name": None},
    ],
)
def test_an_answer_can_be_sent_back_as_history(api, extra):
    back = ChatCompletionMessage.model_validate({"role": "assistant", "content": "ho", **extra})
    asked = ask_chat(api, messages=[*HI, back.model_dump(), {"role": "user", "content": "again"}])
    assert json.loads(asked["messages"])[1] == {"role": "assistant", "content": "ho"}


def test_answers_of_this_server_pass_through_the_openai_client(api):
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=api, max_retries=0)
    said = client.chat.completions.create(model="oarlock", messages=HI).choices[0].message
    Recorder.asked.clear()
    client.chat.completions.create(model="oarlock", messages=[*HI, said, *HI], stop=["x"], max_completion_tokens=2)
    values, _ = Recorder.asked[0]
    assert (
        json.loads(values["messages"])[1]["content"] == "ho" and values["stop"] == ["x"] and values["max_tokens"] == 2
    )


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "must be a text"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]", '{"type": "function"'),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools[0].function.strict", "held to a schema"),
        ({"tools": 5}, "tools", "expected a list"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice", 'got "required"'),
        ({"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls", "got false"),
        ({"functions": [{"name": "f"}]}, "functions", "functions: "),
        ({"tool_choice": "required"}, "tool_choice", 'got "required"'),
        ({"response_format": {"type": "json_object"}}, "response_format", "plain text"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format", "json_schema"),
        ({"logprobs": True}, "logprobs", "log probabilities"),
        ({"top_logprobs": 2}, "top_logprobs", "log probabilities"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities", "answers are text"),
        ({"audio": {"voice": "a", "format": "mp3"}}, "audio", "answers are text"),
        ({"web_search_options": {}}, "web_search_options", "nothing is searched"),
        ({"prediction": {"type": "content", "content": "a"}}, "prediction", "prediction"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "reasoning_effort"),
        ({"store": True}, "store", "nothing is stored"),
        ({"service_tier": "priority"}, "service_tier", "alike"),
        ({"max_token": 3}, "max_token", "did you mean max_tokens?"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1; got 0"),
        ({"max_tokens": "1"}, "max_tokens", 'max_tokens must be a whole number; got "1"'),
        ({"max_tokens": 1.5}, "max_tokens", "whole number; got 1.5"),
        ({"max_tokens": True}, "max_tokens", "whole number; got true"),
        ({"max_completion_tokens": 2**40}, "max_completion_tokens", "at most 2,147,483,647"),
        ({"temperature": 3}, "temperature", "temperature must be at most 2; got 3"),
        ({"temperature": "hot"}, "temperature", 'a number; got "hot"'),
        ({"temperature": float("nan")}, None, "the request:1: NaN is not a JSON number"),
        ({"temperature": 10**400}, None, "the request:1: an integer of 401 digits"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_k": -2}, "top_k", "at least -1"),
        ({"n": 0}, "n", "n must be at least 1"),
        ({"stop": ["a", ""]}, "stop[1]", "stop[1] must be a text that is not empty"),
        ({"stop": ["a"] * 17}, "stop", "a list of at most 16"),
        ({"stop": {"a": 1}}, "stop", "stop must be a list"),
        ({"stream": "yes"}, "stream", 'true or false; got "yes"'),
        ({"stream_options": {"usage": True}}, "stream_options.usage", "no such field"),
        ({"stream_options": True}, "stream_options", "an object; got true"),
        ({"model": ""}, "model", "not empty"),
        ({"model": None}, "model", "model is missing"),
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hi"}, "messages", "a list of at least one message"),
        ({"messages": ["hi"]}, "messages[0]", '{"role": ..., "content": ...}'),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "content is missing"),
        ({"messages": [*HI, {"role": "assistant", "content": None}]}, "messages[1].content", "content is missing"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "a text or a list of parts"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "a text or a list of parts"),
        ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages[0].colour", "no such field"),
        ({"messages": [{"role": "assistant", "content": None, "refusal": "no"}]}, "messages[0].refusal", "as content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}]}]},
            "messages[0].content[0].cache_control",
            "no such field",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "parts of type 'image_url' are not read here",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "must be a text"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]", "an object"),
        ({"messages": [{"role": "assitant", "content": "a"}]}, "messages[0].role", "'assitant' (did you mean 'assistant'?)"),
        ({"messages": [{"role": "User", "content": "a"}]}, "messages[0].role", "'User' (did you mean 'user'?)"),
        ({"messages": [*HI, {"role": "gpt", "content": "a"}]}, "messages[1].role", "'gpt'; known roles are system, developer"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "messages[0].role", "'narrator'; known roles are"),
    ],
    ids=str,
)  # fmt: skip
def test_refusals_name_the_field(api, fields, param, words):
    error = ask_chat(api, **fields)
    assert error["param"] == param and words in error["message"], error


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "a text that is not empty"),
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"prompt": []}, "prompt", "a text that is not empty"),
        ({"prompt": ["a", ""]}, "prompt[1]", 'got ""'),
        ({"prompt": [1, -1]}, "prompt", "token ids"),
        ({"prompt": [[1], [True]]}, "prompt[1]", "token ids"),
        ({"prompt": ["a"] * 17}, "prompt", "at most 16"),
        ({"prompt": {"a": 1}}, "prompt", "a list of token ids"),
        ({"echo": True}, "echo", "not repeated"),
        ({"suffix": "b"}, "suffix", "not inserted"),
        ({"logprobs": 0}, "logprobs", "log probabilities"),
        ({"best_of": 3, "n": 2}, "best_of", "use n"),
        ({"messages": HI}, "messages", "messages: there is no such field"),
    ],
    ids=str,
)
def test_refusals_of_a_completion_name_the_field(api, fields, param, words):
    error = complete(api, **fields)
    assert error["param"] == param and words in error["message"], error
