"""A served model, queried with the OpenAI client."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from serving import ENDLESS, KEY, QUESTION, GrpcStream, chat_tensors


def test_openai_streaming(client):
    messages = [{"role": "user", "content": QUESTION}]
    whole = client.chat.completions.create(model="oarlock", messages=messages, max_completion_tokens=9, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="oarlock",
            messages=messages,
            max_tokens=9,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert not chunks[-1].choices and chunks[-1].usage == whole.usage
    plain = list(client.completions.create(model="oarlock", prompt="river", max_tokens=200, temperature=0, stream=True))
    assert any(c.choices[0].text for c in plain) and plain[-1].choices[0].finish_reason == "length"


def test_chunks_arrive_before_the_answer_ends(server, client):
    """In every protocol that streams; the answer is endless."""
    over_grpc = GrpcStream(server)
    pieces = over_grpc.ask("oarlock", chat_tensors("x", ENDLESS["max_tokens"], stream=True, ignore_eos=True))
    assert [next(pieces).as_numpy("completion_tokens")[0] for _ in range(2)][1] > 1
    over_grpc.close()
    create = client.completions.create
    with create(
        model="oarlock", prompt="x", stream=True, max_tokens=ENDLESS["max_tokens"], extra_body={"ignore_eos": True}
    ) as chunks:
        assert [next(chunks).choices[0].finish_reason for _ in range(2)] == [None, None]
    content = {"text_input": "x", "stream": True, **ENDLESS}
    address = f"{server.rest_url}/v2/models/oarlock/generate_stream"
    with httpx.stream("POST", address, json=content, headers=server.headers) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert [json.loads(next(lines).removeprefix("data: "))["finish_reason"] for _ in range(2)] == ["", ""]


def test_openai_options(client):
    def say(**options):
        return client.completions.create(
            **{"model": "oarlock", "prompt": "river", "max_tokens": 8, "temperature": 0, **options}
        )

    greedy = say().choices[0].text
    cut = say(stop=greedy[3:5]).choices[0]
    assert cut.finish_reason == "stop" and cut.text == greedy[: greedy.index(greedy[3:5])]
    seeded = [say(temperature=1.5, seed=5).choices[0].text for _ in range(2)]
    assert seeded[0] == seeded[1] != say(temperature=1.5, seed=6).choices[0].text
    assert say(temperature=1.5, top_p=1e-6, seed=1).choices[0].text == greedy
    assert (
        say(frequency_penalty=2.0, presence_penalty=2.0, max_tokens=40).choices[0].text
        != say(max_tokens=40).choices[0].text
    )
    many = say(prompt=["river", "window"], n=2)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3] and many.usage.completion_tokens == 32
    assert [choice.text for choice in many.choices] == [greedy, greedy, many.choices[2].text, many.choices[2].text]
    assert say(prompt=[5, 6, 7]).usage.prompt_tokens == 3


def test_answers_without_max_tokens(client):
    made = client.completions.create(model="oarlock", prompt="river", extra_body={"ignore_eos": True})
    assert made.usage.completion_tokens == 16 and made.choices[0].finish_reason == "length"  # OpenAI's


def test_adapters_are_selected_by_name(client, server):
    assert [card.id for card in client.models.list()] == ["oarlock", "pirate"]
    assert client.models.retrieve("pirate").id == "pirate"
    base, lora = (
        client.completions.create(model=name, prompt="river", max_tokens=8, temperature=0).choices[0].text
        for name in ("oarlock", "pirate")
    )
    assert base != lora
    assert server.generate(text_input="river", adapter="pirate", max_tokens=8)["text_output"] == lora


def test_openai_errors(client, server):
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9' here"):
        client.chat.completions.create(model="gpt-9", messages=messages)
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        client.chat.completions.create(model="oarlock", messages=messages, temperature=9)
    assert wrong.value.body["type"] == "invalid_request_error" and wrong.value.body["param"] == "temperature"
    with pytest.raises(openai.BadRequestError, match="a prompt of 12,000 tokens leaves 119,072 of 131,072") as long:
        client.completions.create(model="oarlock", prompt=[5] * 12_000, max_tokens=ENDLESS["max_tokens"])
    assert long.value.body["param"] == "max_tokens"
    with pytest.raises(openai.BadRequestError, match="does not render 'tools'") as lost:
        tools = [{"type": "function", "function": {"name": "f"}}]
        client.chat.completions.create(model="oarlock", messages=messages, tools=tools)
    assert lost.value.body["param"] == "tools"
    for key in ("wrong", KEY[:-1], KEY + "x", "ключ"):
        got = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
        assert got.status_code == 401 and got.json()["error"]["code"] == "invalid_api_key", key
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0).models.list()
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model="oarlock", prompt="x" * 100_001)
    assert large.value.status_code == 413
    chunks = (b"x" * 60_000 for _ in range(2))  # no content length
    kind = {"Content-Type": "application/json"}
    got = httpx.post(f"{server.url}/v1/completions", content=chunks, headers=server.headers | kind)
    assert got.status_code == 413, got.text
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}  # for probes, which send no key
