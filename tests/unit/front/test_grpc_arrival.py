"""How requests arrive at the gRPC port: too long, incomplete, too slowly, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import re

import grpc
import pytest

from grpc_calls import expect_failure, read_texts, run
from oarlock.serve.front.grpc import gate
from oarlock.serve.front.grpc.http2_frames import PREFACE, make_frame
from scripted_triton import front_of_triton, question


def test_a_message_is_refused_for_its_length(tmp_path):
    """Before the rest of it is sent; the connection can be used for other calls."""

    async def work():
        async with front_of_triton(tmp_path) as (stub, _, counts, channel):
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            waiting = stub.ModelStreamInfer()
            for size in (120_000, 5 << 20, 40 << 20):
                code, words = await expect_failure(infer(bytes(size)))
                assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than the 100,000 bytes" in words
            call = stub.ModelStreamInfer()
            await call.write(question("oarlock", b"a"))
            assert read_texts([await call.read()]) == ["a0"]
            with contextlib.suppress(asyncio.InvalidStateError):  # it may have ended already
                await call.write(question("oarlock", bytes(5 << 20)))
            with pytest.raises(grpc.aio.AioRpcError, match=r"larger than the 100,000 bytes"):
                while await call.read() is not grpc.aio.EOF:  # earlier requests are answered
                    pass
            await stub.ModelInfer(question(text=b"x" * 99_990))
            assert 'refused_total{door="grpc",reason="size"} 4' in counts.to_text(True)
            waiting.cancel()

    run(work())


async def connected(channel, name):
    """A raw connection, and the beginning of a call on it."""
    host, _, port = channel.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    path = f"/inference.GRPCInferenceService/{name}".encode()
    headers = (
        b"\x83\x86\x44" + bytes((len(path),)) + path + b"\x41\x01x" + b"\x5f\x10application/grpc\x40\x02te\x08trailers"
    )
    writer.write(PREFACE + make_frame(4, 0, 0) + make_frame(1, 4, 1, headers))
    return reader, writer


def test_a_long_message_is_refused_at_its_start(tmp_path):
    async def work():
        async with front_of_triton(tmp_path) as (_, triton, _, channel):
            reader, writer = await connected(channel, "ModelInfer")
            writer.write(make_frame(0, 0, 1, b"\0\x7f\xff\xff\xff"))  # 2 GiB, of which nothing is sent
            while True:
                head = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(head[:3], "big"))
                if (head[3], head[4] & 1, head[8]) == (1, 1, 1):  # the status of the call
                    break
            writer.close()
            assert not triton.seen

    run(work())


def test_an_incomplete_message_closes_its_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(gate, "_BEGIN_SECONDS", 0.3)

    async def work():
        async with front_of_triton(tmp_path, body_seconds=0.2) as (stub, _, _, channel):
            reader, writer = await connected(channel, "ModelStreamInfer")
            writer.write(make_frame(0, 0, 1, b"\0\0\0\0\x09abc"))
            silent, other = await asyncio.open_connection("127.0.0.1", int(channel.address.rpartition(":")[2]))
            for waiting in (reader, silent):
                with contextlib.suppress(ConnectionResetError):
                    while await waiting.read(1000):
                        pass
            writer.close()
            other.close()
            assert (await stub.ModelInfer(question())).model_name

    run(work())


def test_a_ping_flood_closes_its_connection(tmp_path):
    """The server would keep a reply to each ping for as long as the client does not read."""

    async def work():
        async with front_of_triton(tmp_path) as (stub, _, _, channel):
            reader, writer = await connected(channel, "ModelStreamInfer")
            with contextlib.suppress(ConnectionError):
                writer.write(make_frame(6, 0, 0, bytes(8)) * 20_000)
                while await reader.read(1 << 16):
                    pass
            writer.close()
            assert (await stub.ModelInfer(question())).model_name

    run(work())


def test_a_request_that_never_completes_times_out(tmp_path):
    """An incomplete call, and a connection with incomplete HTTP/2."""

    async def work():
        async with front_of_triton(tmp_path, body_seconds=0.2) as (stub, _, _, channel):
            call = channel.stream_stream("/inference.GRPCInferenceService/ModelInfer")()
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "did not arrive within 0.2 seconds" in await call.details()
            idle = stub.ModelStreamInfer()  # a stream may wait for its next request
            await asyncio.sleep(0.5)
            await idle.write(question("oarlock", b"a"))
            assert read_texts([await idle.read()]) == ["a0"]
            idle.cancel()
            port = int(re.search(r"\d+$", channel.address)[0])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            assert b"HTTP" not in await reader.read()  # the server's settings, then the end
            writer.close()

    run(work())
