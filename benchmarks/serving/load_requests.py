"""The requests of a load test: every kind that a server answers, and what hostile or broken clients send."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import httpx
from load_outcome import Outcome, Target
from load_processes import resident
from tritonclient.grpc import service_pb2, service_pb2_grpc

TOKENS = 6
SAMPLES = 80
GUARD_SECONDS = 120.0


class Load:
    """Sends requests of every kind to a server."""

    def __init__(self, target: Target) -> None:
        self.target, self.outcome = target, Outcome()
        self.openai, self.rest = f"http://127.0.0.1:{target.openai}", f"http://127.0.0.1:{target.rest}"
        self.good: dict[str, Callable[[], Awaitable[str]]] = {
            "OpenAI": self._openai,
            "OpenAI, streamed": self._openai_streamed,
            "OpenAI, chat": self._chat,
            "REST generate": self._generate,
            "REST generate_stream": self._generate_stream,
            "REST infer": self._infer,
            "gRPC": self._grpc,
            "gRPC, streamed": self._grpc_streamed,
            "gRPC, JSON form": self._json_form,
        }
        self.hostile: dict[str, tuple[Callable[[], Awaitable[str]], set[str]]] = {
            "shape of 2^62": (self._bad_shape, {"INVALID_ARGUMENT"}),
            "body too large": (self._large, {"413", "closed"}),
            "body too large, in chunks": (self._large_chunks, {"413", "closed"}),
            "body cut off": (self._cut, {"left"}),
            "body of one byte a second": (self._slow, {"left"}),
            "another host": (self._host, {"400", "403", "421"}),
            "another page": (self._page, {"403"}),
            "no JSON": (self._no_json, {"400"}),
            "no HTTP": (self._no_http, {"400"}),
            "nested JSON": (self._nested, {"400"}),
            "stream left by the client": (self._left, {"left"}),
            "route of the repository": (self._repository, {"404", "405"}),
            "message too long over gRPC": (self._long_message, {"RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"}),
            "infinite temperature": (self._infinite, {"400"}),
        }

    async def run(self, count: int, clients: int, hostile: float) -> Outcome:
        """Send the requests with several clients at once."""
        every = round(1 / hostile) if hostile else 0
        numbers = iter(range(count))
        done, step = 0, max(1, count // SAMPLES)
        began = time.monotonic()

        async def client() -> None:
            nonlocal done
            for number in numbers:
                await self._one(number, every)
                done += 1
                if done % step == 0:
                    self.outcome.samples.append((done, resident(self.target.process)))

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
        async with (
            httpx.AsyncClient(timeout=GUARD_SECONDS, headers=self.target.headers, limits=limits) as self.http,
            grpc.aio.insecure_channel(f"127.0.0.1:{self.target.grpc}") as channel,
        ):
            self.stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            await asyncio.gather(*(client() for _ in range(clients)))
        self.outcome.seconds = time.monotonic() - began
        return self.outcome

    async def _one(self, number: int, every: int) -> None:
        if every and number % every == every - 1:
            kinds = list(self.hostile)
            kind = kinds[number // every % len(kinds)]
            ask, expected = self.hostile[kind]
        else:
            kinds = list(self.good)
            kind = kinds[(number - (number // every if every else 0)) % len(kinds)]
            ask, expected = self.good[kind], {"answered"}
        try:
            answer = await asyncio.wait_for(ask(), GUARD_SECONDS)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"[:160]
        self.outcome.answers[kind, answer] += 1
        if answer not in expected:
            self.outcome.num_unexpected += 1
            self.outcome.unexpected.setdefault(kind, answer)

    # what is answered

    @property
    def _model(self) -> str:
        return self.target.adapter or "oarlock"

    async def _openai(self) -> str:
        made = await self.http.post(f"{self.openai}/v1/completions", json=self._completion())
        return (
            "answered"
            if made.status_code == 200 and made.json()["usage"]["completion_tokens"] == TOKENS
            else _said(made)
        )

    def _completion(self, **more: Any) -> dict[str, Any]:
        return {"model": self._model, "prompt": "river", "max_tokens": TOKENS, "ignore_eos": True, **more}

    async def _openai_streamed(self) -> str:
        lines = []
        async with self.http.stream(
            "POST", f"{self.openai}/v1/completions", json=self._completion(stream=True)
        ) as made:
            async for line in made.aiter_lines():
                lines.append(line)
        return "answered" if made.status_code == 200 and "data: [DONE]" in lines else f"{made.status_code} {lines[-3:]}"

    async def _chat(self) -> str:
        content = self._completion(messages=[{"role": "user", "content": "Repeat the words: river window"}])
        del content["prompt"]
        made = await self.http.post(f"{self.openai}/v1/chat/completions", json=content)
        return "answered" if made.status_code == 200 else _said(made)

    def _fields(self, **more: Any) -> dict[str, Any]:
        adapter = {"adapter": self.target.adapter} if self.target.adapter else {}
        return {"text_input": "river", "max_tokens": TOKENS, "ignore_eos": True, **adapter, **more}

    async def _generate(self) -> str:
        made = await self.http.post(f"{self.rest}/v2/models/oarlock/generate", json=self._fields())
        return "answered" if made.status_code == 200 and made.json()["completion_tokens"] == TOKENS else _said(made)

    async def _generate_stream(self) -> str:
        address, last = f"{self.rest}/v2/models/oarlock/generate_stream", ""
        async with self.http.stream("POST", address, json=self._fields(stream=True)) as made:
            async for line in made.aiter_lines():
                last = line or last
        return "answered" if made.status_code == 200 and '"length"' in last else f"{made.status_code} {last[:120]}"

    async def _infer(self) -> str:
        inputs = [
            {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["river"]},
            {"name": "max_tokens", "shape": [1], "datatype": "INT32", "data": [TOKENS]},
        ]
        made = await self.http.post(f"{self.rest}/v2/models/oarlock_infer/infer", json={"inputs": inputs})
        return "answered" if made.status_code == 200 and made.json()["outputs"] else _said(made)

    def _request(self, model: str) -> Any:
        request = service_pb2.ModelInferRequest(model_name=model)
        _text(request, "text_input", b"river")
        request.inputs.add(name="max_tokens", datatype="INT32", shape=[1])
        request.raw_input_contents.append(TOKENS.to_bytes(4, "little"))
        return request

    @property
    def _metadata(self) -> Any:
        return tuple(self.target.headers.items())

    async def _grpc(self) -> str:
        made = await self.stub.ModelInfer(
            self._request("oarlock_infer"), metadata=self._metadata, timeout=GUARD_SECONDS
        )
        return "answered" if made.outputs else "no outputs"

    async def _grpc_streamed(self) -> str:
        request = self._request("oarlock")
        request.inputs.add(name="stream", datatype="BOOL", shape=[1])
        request.raw_input_contents.append(b"\1")
        return await self._stream(request)

    async def _json_form(self) -> str:
        request = service_pb2.ModelInferRequest(model_name="oarlock_json")
        _text(request, "IN", json.dumps({"text": "river", "max_dec_len": TOKENS}).encode())
        return await self._stream(request)

    async def _stream(self, request: Any) -> str:
        parts = 0
        call = self.stub.ModelStreamInfer(_single(request), metadata=self._metadata, timeout=GUARD_SECONDS)
        async for made in call:
            if made.error_message:
                return str(made.error_message)[:160]
            parts += 1
        return "answered" if parts else "no answer"

    # what is not

    async def _bad_shape(self) -> str:
        request = self._request("oarlock_infer")
        request.inputs[0].shape[:] = [2**62]
        try:
            await self.stub.ModelInfer(request, metadata=self._metadata, timeout=GUARD_SECONDS)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return "answered"

    async def _long_message(self) -> str:
        request = service_pb2.ModelInferRequest(model_name="oarlock_infer")
        _text(request, "text_input", b"x" * (self.target.max_body + 50_000))
        try:
            await self.stub.ModelInfer(request, metadata=self._metadata, timeout=GUARD_SECONDS)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return "answered"

    async def _large(self) -> str:
        return await self._raw(self._head(length=self.target.max_body * 4), b"x" * (self.target.max_body // 2))

    async def _large_chunks(self) -> str:
        chunk = b"%x\r\n%s\r\n" % (65536, b"x" * 65536)
        return await self._raw(self._head(chunked=True), chunk * (self.target.max_body // 65536 + 4))

    async def _cut(self) -> str:
        return await self._raw(self._head(length=1000), b'{"model": "oarl', leave=True)

    async def _slow(self) -> str:
        return await self._raw(self._head(length=1000), b"{", b" ", b" ", pause=0.5, leave=True)

    async def _host(self) -> str:
        return await self._raw(self._head(host="attacker.example", length=2), b"{}")

    async def _page(self) -> str:
        return await self._raw(self._head(length=2, more="Origin: https://attacker.example\r\n"), b"{}")

    async def _no_json(self) -> str:
        return await self._raw(self._head(length=3), b'{"a')

    async def _no_http(self) -> str:
        return await self._raw(b"\x16\x03\x01 no HTTP at all\r\n\r\n")

    async def _nested(self) -> str:
        return await self._raw(self._head(length=100_000 if self.target.max_body > 100_000 else 5000), b"[" * 100_000)

    async def _left(self) -> str:
        content = json.dumps(self._completion(stream=True, max_tokens=400)).encode()
        return await self._raw(self._head(length=len(content)), content, answer_bytes=200, leave=True)

    async def _repository(self) -> str:
        made = await self.http.post(f"{self.rest}/v2/repository/models/oarlock/unload", json={})
        return str(made.status_code)

    async def _infinite(self) -> str:
        content = json.dumps(self._completion()).replace('"max_tokens"', '"temperature": 1e400, "max_tokens"').encode()
        return await self._raw(self._head(length=len(content)), content)

    def _head(self, host: str = "localhost", length: int = 0, chunked: bool = False, more: str = "") -> bytes:
        size = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {length}"
        key = f"Authorization: Bearer {self.target.key}\r\n" if self.target.key else ""
        return (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"{key}{more}{size}\r\n\r\n"
        ).encode()

    async def _raw(self, *parts: bytes, pause: float = 0.0, leave: bool = False, answer_bytes: int = 0) -> str:
        """Bytes on a connection of its own; the status, "left" when we leave first, "closed" when the server does."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.target.openai)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
            if answer_bytes:
                await reader.read(answer_bytes)
            if leave:
                return "left"
            line = await reader.readline()
            return line.split()[1].decode() if line.startswith(b"HTTP/1.1 ") else "closed"
        except ConnectionError:
            return "closed"
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def _text(request: Any, name: str, text: bytes) -> None:
    request.inputs.add(name=name, datatype="BYTES", shape=[1])
    request.raw_input_contents.append(len(text).to_bytes(4, "little") + text)


async def _single(request: Any) -> Any:
    yield request


def _said(made: httpx.Response) -> str:
    return f"{made.status_code} {made.text[:120]}"
