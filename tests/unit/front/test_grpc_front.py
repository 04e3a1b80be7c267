"""The gRPC port in front of a scripted Triton: what is forwarded, what is refused, and that nothing leaks."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from grpc_calls import ask_all, expect_failure, read_texts, run, wait_until
from oarlock.serve.front.admission import Admission
from oarlock.serve.triton.client import TritonClient, TritonFailure
from scripted_triton import ScriptedTriton, front_of_triton, question, start_triton

UNAVAILABLE, INVALID = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INVALID_ARGUMENT


def test_requests_and_answers_are_forwarded(tmp_path):
    async def work():
        async with front_of_triton(tmp_path) as (stub, triton, counts, _):
            asked = question(text="大".encode())
            asked.id = "7"
            made = await stub.ModelInfer(asked)
            assert (made.id, made.raw_output_contents[0][4:].decode()) == ("7", "大0") and triton.seen == [asked]
            streamed = await ask_all(stub, question("oarlock", b"a"))
            assert read_texts(streamed) == ["a0", "a1", "a2"]
            ends = [a.infer_response.parameters["triton_final_response"].bool_param for a in streamed]
            assert ends == [False, False, True]
            assert (await stub.ServerLive(service_pb2.ServerLiveRequest())).live
            assert (await stub.ModelReady(service_pb2.ModelReadyRequest(name="oarlock"))).ready
            unknown = service_pb2.ModelConfigRequest(name="nobody")
            assert (await expect_failure(stub.ModelConfig(unknown)))[0] is grpc.StatusCode.NOT_FOUND
            counts.restarts = {"triton": 2}
            text = counts.to_text(True)
            assert 'oarlock_front_requests_total{door="grpc",route="ModelInfer",code="OK"} 1' in text
            assert 'oarlock_restarts_total{part="triton"} 2' in text

    run(work())


def test_several_requests_of_a_stream_and_their_errors(tmp_path):
    """Decoupled responses arrive as they are made; those of other models in the order of the requests."""

    async def work():
        async with front_of_triton(tmp_path) as (stub, triton, _, _):
            triton.pieces = 2
            triton.gate.clear()
            call = stub.ModelStreamInfer()
            await call.write(question("oarlock", b"slow"))
            assert read_texts([await call.read()]) == ["slow0"]
            wrong = question("oarlock", b"x", max_tokens=("INT32", [2**62], b""))
            wrong.id = "w"
            await call.write(wrong)
            refusal = await call.read()
            assert "max_tokens: shape" in refusal.error_message and refusal.infer_response.id == "w"
            await call.write(service_pb2.ModelInferRequest(model_name="nobody"))
            assert "unknown model" in (await call.read()).error_message
            triton.gate.set()
            assert read_texts([await call.read()]) == ["slow1"]
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF and len(triton.seen) == 1

            triton.pieces = 1
            order = [str(i) for i in range(30)]
            asked = [question("oarlock_infer", text.encode()) for text in order]
            assert read_texts(await ask_all(stub, *asked)) == [f"{text}0" for text in order]
            triton.fails = lambda request: "it broke"
            assert read_texts(await ask_all(stub, question("oarlock"))) == ["it broke"]

    run(work())


def test_a_disconnected_client_cancels_its_request(tmp_path):
    async def work():
        async with front_of_triton(tmp_path) as (stub, triton, counts, _):
            triton.gate.clear()
            stream = stub.ModelStreamInfer()
            await stream.write(question("oarlock"))
            await stream.read()
            stream.cancel()
            waiting = stub.ModelInfer(question())
            await wait_until(lambda: len(triton.seen) == 2)
            waiting.cancel()
            await wait_until(lambda: triton.cancelled == 2)
            await wait_until(lambda: 'route="ModelInfer",code="CANCELLED"' in counts.to_text(True))
            late = stub.ModelInfer(question(), timeout=0.3)
            assert (await expect_failure(late))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
            await wait_until(lambda: triton.cancelled == 3)

    run(work())  # front_of_triton() checks that no slot leaks


def test_unknown_models_and_methods_are_refused(tmp_path):
    async def work():
        async with front_of_triton(tmp_path) as (stub, triton, _, channel):
            for name in ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings",
                         "SystemSharedMemoryRegister", "SystemSharedMemoryStatus", "CudaSharedMemoryStatus"):  # fmt: skip
                request = getattr(service_pb2, f"{name}Request")()
                assert (await expect_failure(getattr(stub, name)(request)))[0] is grpc.StatusCode.UNIMPLEMENTED
            for path in ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/x/y"):
                assert (await expect_failure(channel.unary_unary(path)(b"")))[0] is grpc.StatusCode.UNIMPLEMENTED
            assert await channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"
            packed = stub.ModelInfer(question(), compression=grpc.Compression.Gzip)
            assert (await expect_failure(packed))[0] is grpc.StatusCode.UNIMPLEMENTED
            broken = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\xff\xff")
            assert await expect_failure(broken) == (INVALID, "the request is not a valid ModelInferRequest")
            unknown = question()
            data = unknown.SerializeToString() + b"\xfa\x3f\x01x"  # an unknown field
            await channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(data)
            assert triton.seen == [unknown]

    run(work())


def test_a_key_is_required(tmp_path):
    async def work():
        async with front_of_triton(tmp_path, keys=["one", "two"]) as (stub, triton, counts, _):
            for metadata in ((), (("authorization", "Bearer no"),), (("authorization", "two"),)):
                code, words = await expect_failure(stub.ModelInfer(question(), metadata=metadata))
                assert code is grpc.StatusCode.UNAUTHENTICATED and "API key" in words
            config = service_pb2.ModelConfigRequest(name="oarlock")
            assert (await expect_failure(stub.ModelConfig(config)))[0] is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.aio.AioRpcError, match="API key"):
                await ask_all(stub, question("oarlock"))
            assert not triton.seen and 'reason="key"} 5' in counts.to_text(True)
            await stub.ModelInfer(question(), metadata=(("authorization", "Bearer two"),))
            assert (await stub.ServerReady(service_pb2.ServerReadyRequest())).ready  # for probes

    run(work())


def test_the_number_of_open_requests_is_limited(tmp_path):
    """Per client, and in total; all clients on this machine count as one."""

    async def work():
        async with front_of_triton(tmp_path, max_open_per_client=2) as (stub, triton, _, _):
            triton.gate.clear()
            open_ones = [asyncio.create_task(_waited(stub.ModelInfer(question()))) for _ in range(2)]
            await wait_until(lambda: len(triton.seen) == 2)
            code, words = await expect_failure(stub.ModelInfer(question()))
            assert code is UNAVAILABLE and words == "2 requests of this client are open; try again later"
            assert read_texts(await ask_all(stub, question("oarlock"))) == [words]
            triton.gate.set()
            await asyncio.gather(*open_ones)
            await stub.ModelInfer(question())

    run(work())


async def _waited(call):
    return await call


def test_triton_restarts(tmp_path):
    async def work():
        path, triton = tmp_path / "grpc:1", ScriptedTriton()
        upstream = TritonClient(f"unix:{path}")
        assert not await upstream.is_server_ready() and not await upstream.is_model_ready("oarlock")
        for _ in range(2):  # quickly, each time
            behind = await start_triton(path, triton)
            await until_available(upstream)
            triton.gate.clear()
            stream = upstream.stream(question("oarlock"))
            await anext(stream)
            asked = asyncio.create_task(upstream.call("ModelInfer", question()))
            await wait_until(lambda: len(triton.seen) == 2)
            await behind.stop(0)
            for waiting in (asked, anext(stream)):
                with pytest.raises(TritonFailure, match="the model is being started") as caught:
                    await waiting
                assert caught.value.code is UNAVAILABLE
            with pytest.raises(TritonFailure, match="the model is being started"):
                await upstream.call("ModelInfer", question().SerializeToString())
            triton.seen.clear()
        await upstream.close()

    async def until_available(upstream):
        while not await upstream.is_server_ready():
            await asyncio.sleep(0.05)

    run(work())


def test_probes_while_triton_is_down(tmp_path):
    async def work():
        async with front_of_triton(tmp_path) as (stub, triton, _, channel):
            await triton.server.stop(0)
            assert (await stub.ServerLive(service_pb2.ServerLiveRequest())).live
            assert not (await stub.ServerReady(service_pb2.ServerReadyRequest())).ready
            assert await channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x02"
            code, words = await expect_failure(stub.ModelInfer(question()))
            assert code is UNAVAILABLE and words == "the model is being started; try again soon"
            assert read_texts(await ask_all(stub, question("oarlock"))) == [words]

    run(work())


def test_a_port_in_use_is_reported(tmp_path):
    from oarlock.errors import EnvironmentProblem
    from oarlock.serve.config import FrontConfig, ServeConfig, TritonConfig
    from oarlock.serve.front.grpc.server import make_grpc_server
    from oarlock.serve.front.keys import Keys

    async def work():
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            front = FrontConfig(grpc_port=taken.getsockname()[1])
            config = ServeConfig(triton=TritonConfig(run=str(tmp_path)), front=front)
            upstream = TritonClient(f"unix:{config.triton.grpc_socket}")
            server = make_grpc_server(config, upstream, Keys(), Admission(1, 1))
            with pytest.raises(EnvironmentProblem, match="--grpc-port"):
                await server.start()
            await server.stop(0)
            await upstream.close()

    run(work())


def test_the_scripted_triton_implements_only_methods_of_the_stub():
    """A misspelled method would make a test meaningless."""
    known = set(vars(service_pb2_grpc.GRPCInferenceServiceServicer))
    assert {name for name in vars(ScriptedTriton) if name[0].isupper()} <= known
