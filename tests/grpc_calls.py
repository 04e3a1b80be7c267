"""Calls of the gRPC port, and helpers that wait."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from scripted_triton import GUARD_S


def run(work):
    """Run a coroutine for at most GUARD_S seconds."""
    return asyncio.run(asyncio.wait_for(work, GUARD_S))


async def expect_failure(call):
    """(code, details) of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


async def wait_until(is_so):
    """Wait until a condition holds."""
    while not is_so():
        await asyncio.sleep(0.01)


def read_texts(answers):
    """The text, or the error, of each answer of a stream."""
    return [a.error_message or a.infer_response.raw_output_contents[0][4:].decode() for a in answers]


async def ask_all(stub, *requests):
    """All answers to the requests of one stream."""
    call = stub.ModelStreamInfer()
    for request in requests:
        await call.write(request)
    await call.done_writing()
    return [answer async for answer in call]
