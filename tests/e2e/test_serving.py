"""`oarlock serve` and clients nobody here wrote: tritonclient, openai, curl, schemathesis. One server for all of it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error

import grpc
import httpx
import hypothesis.strategies as st
import numpy as np
import openai
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from hypothesis import HealthCheck, given, settings
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from helpers import ROOT, make_tiny_model
from oarlock.export.manifest import read_manifest
from oarlock.export.triton import export_triton, read_config
from serving import Server, gone, is_free

KEY = "a-key-for-the-tests"
QUESTION = "Repeat the words.\nriver window"
LONG = {"ignore_eos": True, "max_tokens": 3000}  # some seconds
TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model of many layers with a long context, so that an answer can take a while."""
    return make_tiny_model(
        tmp_path_factory.mktemp("served") / "model", max_position_embeddings=4096, num_hidden_layers=12
    )


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    from test_merge import make_adapter  # tests/parity

    return make_adapter(model, tmp_path_factory.mktemp("adapter") / "lora", std=0.5)


@pytest.fixture(scope="module")
def repository(model, adapter, tmp_path_factory):
    return export_triton(model, {"pirate": adapter}, tmp_path_factory.mktemp("export") / "repository").folder


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory):
    place = tmp_path_factory.mktemp("server")
    (place / "keys").write_text(f"# for the tests\nanother\n{KEY}\n")
    words = ("--api-key-file", str(place / "keys"), "--max-batch", "4", "--max-queue", "40", "--max-body", "100000")
    running = Server(repository, place / "log", words)
    try:
        running.wait_ready()
        yield running
    finally:
        if running.process.poll() is None:
            running.stop(signal.SIGTERM)
        print(running.said())


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def tensor(name, values, kind):
    array = np.array(
        [v.encode() for v in values] if kind == "BYTES" else values,
        dtype={"BYTES": object, "INT32": np.int32, "FP32": np.float32, "BOOL": bool, "INT64": np.int64}[kind],
    )
    made = grpcclient.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made


def chat_tensors(question, tokens=TOKENS, **more):
    kinds = {"stream": "BOOL", "ignore_eos": "BOOL", "temperature": "FP32", "seed": "INT64", "adapter": "BYTES"}
    extra = [tensor(name, [value], kinds[name]) for name, value in more.items()]
    return [
        tensor("text_input", [question], "BYTES"),
        tensor("chat", [True], "BOOL"),
        tensor("max_tokens", [tokens], "INT32"),
        *extra,
    ]


class GrpcStream:
    """tritonclient's streaming, as a loop."""

    def __init__(self, server):
        self.client = grpcclient.InferenceServerClient(server.grpc_url)
        self.results = queue.Queue()
        self.client.start_stream(lambda result, error: self.results.put(error or result))

    def ask(self, model, inputs):
        self.client.async_stream_infer(model, inputs, enable_empty_final_response=True)
        while True:
            result = self.results.get(timeout=60)
            if isinstance(result, Exception):
                raise result
            response = result.get_response()
            if response.outputs:
                yield result
            if response.parameters["triton_final_response"].bool_param:
                return

    def close(self):
        self.client.stop_stream(cancel_requests=True)
        self.client.close()


@pytest.fixture(scope="module")
def stream(server):
    made = GrpcStream(server)
    yield made
    made.close()


def test_the_same_tokens_by_every_way(server, client, stream, model):
    """Beside them all: the model as `oarlock ask` runs it, one prompt at a time, without the engine."""
    from oarlock.data.labels import encode_text
    from oarlock.models.generate import generate_ids
    from oarlock.models.tuned import open_tuned

    tuned = open_tuned(str(model))
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tuned.template.render(messages, add_generation_prompt=True)
    (expected,) = generate_ids(tuned.model, tuned.tokenizer, [encode_text(tuned.tokenizer, prompt)], TOKENS)
    expected = [int(token) for token in expected]
    text = tuned.tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert len(set(expected)) > 3  # says something

    rest = server.generate(messages=json.dumps(messages), max_tokens=TOKENS)
    assert rest["token_ids"] == expected
    assert rest["text_output"] == text and rest["finish_reason"] == "length"

    pieces = list(stream.ask("oarlock", chat_tensors(QUESTION, stream=True)))
    assert [int(t) for piece in pieces for t in piece.as_numpy("token_ids")] == expected
    assert "".join(piece.as_numpy("text_output")[0].decode() for piece in pieces) == text
    assert len(pieces) > 1  # as they came

    for made in (grpcclient.InferenceServerClient(server.grpc_url).infer("oarlock_infer", chat_tensors(QUESTION)),):
        assert made.as_numpy("token_ids").tolist() == expected and made.as_numpy("text_output")[0].decode() == text
    inputs = [httpclient.InferInput("text_input", [1], "BYTES"), httpclient.InferInput("max_tokens", [1], "INT32")]
    inputs[0].set_data_from_numpy(np.array([prompt.encode()], dtype=object))
    inputs[1].set_data_from_numpy(np.array([TOKENS], np.int32), binary_data=False)
    http = httpclient.InferenceServerClient(f"127.0.0.1:{server.rest}").infer("oarlock_infer", inputs)
    assert http.as_numpy("token_ids").tolist() == expected

    form = {"messages": messages, "max_dec_len": TOKENS, "temperature": 0, "req_id": "r-7"}
    parts = [
        json.loads(p.as_numpy("OUT")[0])
        for p in stream.ask("oarlock_json", [tensor("IN", [json.dumps(form)], "BYTES")])
    ]
    assert [t for part in parts for t in part["token_ids"]] == expected
    assert "".join(part["result"] for part in parts) == text
    assert [part["send_idx"] for part in parts] == list(range(len(parts)))
    assert [part["is_end"] for part in parts] == [0] * (len(parts) - 1) + [1]
    assert {part["req_id"] for part in parts} == {"r-7"} and set(parts[0]) == {
        "result",
        "req_id",
        "token_ids",
        "send_idx",
        "is_end",
    }

    answer = client.chat.completions.create(model="oarlock", messages=messages, max_tokens=TOKENS, temperature=0)
    assert answer.choices[0].message.content == text and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == TOKENS and answer.usage.prompt_tokens == rest["prompt_tokens"]
    plain = client.completions.create(model="oarlock", prompt=prompt, max_tokens=TOKENS, temperature=0)
    assert plain.choices[0].text == text


def test_openai_streams(client):
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
    assert sum(bool(c.choices[0].text) for c in plain) > 1 and plain[-1].choices[0].finish_reason == "length"


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


def test_adapters_have_names(client, server):
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
    with pytest.raises(openai.BadRequestError, match=r"leaves 4,\d+ of 4,096"):
        client.chat.completions.create(model="oarlock", messages=messages, max_tokens=4096)
    for key in ("wrong", KEY[:-1], KEY + "x", "ключ"):
        got = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
        assert got.status_code == 401 and got.json()["error"]["code"] == "invalid_api_key", key
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0).models.list()
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model="oarlock", prompt="x" * 100_001)
    assert large.value.status_code == 413
    chunks = (b"x" * 60_000 for _ in range(2))  # no length is announced
    got = httpx.post(f"{server.url}/v1/completions", content=chunks, headers={"Authorization": f"Bearer {KEY}"})
    assert got.status_code == 413, got.text
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}  # for probes, which have no key


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")
def test_curl(server):
    """The command that the server shows, and Triton's health route."""
    (line,) = [line for line in server.said().splitlines() if line.strip().startswith("try ")]
    shown = subprocess.run(["bash", "-c", line.strip().removeprefix("try").strip() + " -s"], env={"KEY": KEY, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)  # fmt: skip
    assert json.loads(shown.stdout)["choices"][0]["message"]["content"]
    status = subprocess.run(["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"{server.rest_url}/v2/health/ready"], capture_output=True, text=True, check=True)  # fmt: skip
    assert status.stdout == "200"
    wanted = json.dumps({"text_input": QUESTION, "chat": True, "stream": True, "max_tokens": 4})
    events = subprocess.run(["curl", "-sN", f"{server.rest_url}/v2/models/oarlock/generate_stream", "-d", wanted], capture_output=True, text=True, check=True)  # fmt: skip
    parts = [
        json.loads(line.removeprefix("data: ")) for line in events.stdout.splitlines() if line.startswith("data: ")
    ]
    assert parts[-1]["completion_tokens"] == 4 and parts[-1]["finish_reason"] == "length"


def test_answers_in_a_batch_equal_answers_alone(server, client):
    questions = [f"Repeat the words.\n{word}" for word in ("river", "window tea", "sheep", "a b c d e f", "x", "大")]

    def ask(question):
        return server.generate(text_input=question, chat=True, max_tokens=20)["token_ids"]

    alone = [ask(question) for question in questions]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, questions * 3))
    assert together == alone * 3


def test_a_client_that_goes_away_frees_its_place(server, client):
    """By every way in; a place that is not freed would take many seconds."""
    server.wait_idle()
    started = time.monotonic()
    stream = client.completions.create(
        model="oarlock", prompt="x", stream=True, max_tokens=3000, temperature=0, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    server.wait_open(1)
    stream.close()
    server.wait_idle(3)

    with contextlib.suppress(httpx.TimeoutException):  # one that waits for the whole answer
        httpx.post(
            f"{server.url}/v1/completions",
            headers={"Authorization": f"Bearer {KEY}"},
            json={"model": "oarlock", "prompt": "x", **LONG},
            timeout=0.5,
        )
        raise AssertionError("the model is too quick for this test")
    server.wait_idle(3)

    over_grpc = GrpcStream(server)
    next(over_grpc.ask("oarlock", chat_tensors("x", 3000, stream=True, ignore_eos=True)))
    over_grpc.close()
    server.wait_idle(3)

    over_grpc = GrpcStream(server)  # through the model beside it, where Triton has no cancellation of its own
    form = json.dumps({"text": "x", "max_dec_len": 3000, "min_dec_len": 3000})
    next(over_grpc.ask("oarlock_json", [tensor("IN", [form], "BYTES")]))
    over_grpc.close()
    server.wait_idle(3)

    with contextlib.suppress(socket.timeout, TimeoutError):
        server.post("/v2/models/oarlock/generate", {"text_input": "x", **LONG}, timeout=0.5)
        raise AssertionError("the model is too quick for this test")
    server.wait_idle(3)
    assert time.monotonic() - started < 20


def test_a_full_queue_says_so(server, client):
    """4 places and a queue of 40."""
    requests = [threading.Event() for _ in range(50)]
    streams = [GrpcStream(server) for _ in range(2)]
    refused = 0
    try:
        for i, _ in enumerate(requests):
            streams[i % 2].client.async_stream_infer("oarlock", chat_tensors("x", 3000, stream=True, ignore_eos=True))
        deadline = time.monotonic() + 20
        while refused < 6 and time.monotonic() < deadline:
            for made in streams:
                with contextlib.suppress(queue.Empty):
                    refused += isinstance(made.results.get(timeout=0.02), InferenceServerException)
        assert refused == 6
        with pytest.raises(openai.APIStatusError, match="requests wait already") as busy:
            client.completions.create(model="oarlock", prompt="x")
        assert busy.value.status_code == 503
    finally:
        for made in streams:
            made.close()
    server.wait_idle()


NAMES = [
    "text_input",
    "messages",
    "input_ids",
    "chat",
    "stream",
    "adapter",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "ignore_eos",
    "nobody",
]
TYPES = {
    "BYTES": None,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP32": np.float32,
    "FP64": np.float64,
    "BOOL": np.bool_,
    "UINT8": np.uint8,
}


@st.composite
def wild_tensors(draw):
    """A request with anything in it: names, types, shapes, sizes, contents that fit and that do not."""
    request = service_pb2.ModelInferRequest()
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)):
        made = request.inputs.add()
        made.name = name
        made.datatype = draw(st.sampled_from([*TYPES, "BYTES", "BYTES", "FP99"]))
        made.shape.extend(draw(st.sampled_from([[1], [1], [1], [2], [0], [1, 1], [-1], [], [2**40]])))
        if made.datatype == "BYTES":
            texts = draw(st.lists(st.binary(max_size=12), min_size=1, max_size=2))
            content = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
            content = draw(
                st.sampled_from([content, content, content[:-1], b"\xff\xff\xff\xff", b"\xff\xff\xff\x7fabc", b""])
            )
        else:
            content = draw(
                st.one_of(
                    st.binary(max_size=16),
                    st.sampled_from([b"\x01", b"\x01\0\0\0", b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff" * 8]),
                )
            )
        request.raw_input_contents.append(content)
    return request


def test_any_tensors_are_refused_as_invalid(server):
    """Over gRPC, by both kinds of models; the server is as it was afterwards."""
    channel = grpc.insecure_channel(server.grpc_url)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    processes = server.processes()
    counts = {"refused": 0, "answered": 0}

    def outcome(call):
        try:
            call()
            counts["answered"] += 1
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, (error.code(), error.details())
            counts["refused"] += 1

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(wild_tensors())
    def fuzz(request):
        if not any(made.name == "max_tokens" for made in request.inputs):
            made = request.inputs.add()
            made.name, made.datatype = "max_tokens", "INT32"
            made.shape.append(1)
            request.raw_input_contents.append(b"\x02\0\0\0")
        request.model_name = "oarlock"
        outcome(
            lambda: list(stub.ModelStreamInfer(iter([request]), metadata=(("triton_grpc_error", "true"),), timeout=30))
        )
        request.model_name = "oarlock_infer"
        outcome(lambda: stub.ModelInfer(request, timeout=30))

    fuzz()
    broken = service_pb2.ModelInferRequest(model_name="oarlock_json")
    made = broken.inputs.add(name="IN", datatype="BYTES", shape=[1])
    for text in (
        b"\xff\xfe",
        b"{",
        b"[]",
        b"{}",
        b'{"text": 5}',
        b'{"text": "x", "topp": "y"}',
        b'{"text": "x", "hm": 1}',
        b'{"text": "x", "max_dec_len": 99999999999}',
        b'{"text": "x", "temperature": NaN}',
        b"[" * 5000,
    ):
        del broken.raw_input_contents[:]
        broken.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
        before = counts["refused"]
        outcome(
            lambda: list(stub.ModelStreamInfer(iter([broken]), metadata=(("triton_grpc_error", "true"),), timeout=30))
        )
        assert counts["refused"] == before + 1, text
    assert made.name == "IN"
    channel.close()
    assert counts["refused"] > 100 and counts["answered"] > 5, counts
    assert server.processes() == processes
    assert server.generate(text_input="x", max_tokens=3)["completion_tokens"] == 3
    assert "Traceback" not in server.said()


def test_invalid_requests_name_what_is_wrong(server):
    for fields, words in (
        ({}, "give one of text_input, messages and input_ids; got none"),
        ({"text_input": "x", "messages": "[]"}, "got text_input, messages"),
        ({"messages": "{"}, "messages: not JSON"),
        ({"messages": "[5]"}, 'messages[0] has to be {"role"'),
        ({"text_input": "x", "adapter": "nobody"}, "there is no adapter 'nobody'"),
        ({"text_input": "x", "temperature": -1}, "temperature has to be from 0"),
        ({"text_input": "x", "stop": ["a"] * 17}, "stop: at most 16 texts"),
        ({"text_input": "x" * 100_001}, "larger than the 100,000 bytes"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.generate(**{"max_tokens": 2, **fields})
        assert refused.value.code == 400 and words in json.loads(refused.value.read())["error"]


def test_schemathesis(server, tmp_path):
    """Every route of the OpenAPI description, with what fits it and what does not: nothing but what is described."""
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {KEY}",
         "--max-examples", "25", "--phases", "examples,coverage,fuzzing", "--seed", "1", "--request-timeout", "30", "--generation-database", "none",
         "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"],
        capture_output=True, text=True, timeout=170, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert httpx.get(f"{server.url}/health").status_code == 200 and "Traceback" not in server.said()


def test_reload_under_load_loses_nothing(server, client, repository):
    """200 requests from 16 clients, while the model is loaded anew in the place of the old one."""
    (repository / "oarlock" / "1" / "model.py").touch()  # else Triton sees nothing to load
    expected = server.generate(text_input="river", max_tokens=16)["text_output"]
    before = set(server.processes())
    reloaded = threading.Event()

    def reload():
        server.post("/v2/repository/models/oarlock/load", {})
        reloaded.set()

    def ask(i):
        if i % 3:
            return (
                client.completions.create(model="oarlock", prompt="river", max_tokens=16, temperature=0).choices[0].text
            )
        if i % 2:
            return server.generate(text_input="river", max_tokens=16)["text_output"]
        inputs = [tensor("text_input", ["river"], "BYTES"), tensor("max_tokens", [16], "INT32")]
        with grpcclient.InferenceServerClient(server.grpc_url) as over_grpc:
            return over_grpc.infer("oarlock_infer", inputs).as_numpy("text_output")[0].decode()

    loader = threading.Thread(target=reload)
    loader.start()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(200)))
        while not reloaded.is_set():  # some of them after the change, too
            answers += pool.map(ask, range(16))
        answers += pool.map(ask, range(32))
    loader.join()
    assert len(answers) >= 200 and set(answers) == {expected}
    assert len(set(server.processes()) - before) == 1  # the model's new process


def test_sigterm_answers_what_is_open_and_leaves_nothing(server, client):
    """The last test of this server."""
    processes = server.processes()
    assert len(processes) > 3 and server.memory()
    answers = []

    def ask(tokens):
        answers.append(server.generate(text_input="x", max_tokens=tokens, ignore_eos=True)["completion_tokens"])

    def ask_openai(tokens):
        chunks = client.completions.create(
            model="oarlock",
            prompt="x",
            max_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        answers.append(list(chunks)[-1].usage.completion_tokens)

    threads = [threading.Thread(target=ask, args=(600,)), threading.Thread(target=ask_openai, args=(601,))]
    for thread in threads:
        thread.start()
    server.wait_open(2)
    assert server.stop(signal.SIGTERM) == 0, server.said()
    for thread in threads:
        thread.join(10)
    assert sorted(answers) == [600, 601], server.said()
    assert gone(processes, 1) and not server.memory()
    assert all(is_free(port) for port in server.ports)
    assert "Traceback" not in server.said()


def test_killed_it_leaves_nothing_either(model, tmp_path):
    """SIGKILL of the first process alone; started on a model folder, which is exported by the way."""
    running = Server(model, tmp_path / "log")
    try:
        running.wait_ready()
        processes = running.processes()
        assert running.generate(text_input="x", max_tokens=2)["completion_tokens"] == 2
    finally:
        running.process.kill()
        running.process.wait()
    assert gone(processes, 15)
    deadline = time.monotonic() + 5
    while running.memory() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running.memory()


def test_a_model_that_does_not_load_says_why_once(repository, tmp_path):
    broken = tmp_path / "repository"
    shutil.copytree(repository, broken)
    (broken / "oarlock" / "1" / "model" / "config.json").write_text("{")
    running = Server(broken, tmp_path / "log")
    assert running.process.wait(60) == 1
    assert running.said().count("config.json: not") == 1, running.said()
    assert "oarlock: error: the model does not load:" in running.said() and not running.memory()


def test_a_taken_port_is_said_before_the_start(repository, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        running = Server(
            repository,
            tmp_path / "log",
            ports=[*Server.__dataclass_fields__["ports"].default_factory()[:3], taken.getsockname()[1]],
        )
        assert running.process.wait(30) == 1
    assert "--metrics-port" in running.said() and "the port is taken" in running.said()


def test_the_configurations_are_what_the_models_read(repository):
    """Triton's own protobuf reads them, and the fields in code are those of the configuration."""
    from oarlock.serve.triton_fields import FIELDS, OUTPUTS

    kinds = {8: int, 9: int, 11: float, 13: str, 1: bool}  # TYPE_INT32, INT64, FP32, STRING, BOOL
    config = read_config(repository / "oarlock" / "config.pbtxt")
    assert {i.name: (kinds[i.data_type], list(i.dims) == [-1]) for i in config.input} == FIELDS
    assert [o.name for o in config.output] == list(OUTPUTS) and config.model_transaction_policy.decoupled
    infer = read_config(repository / "oarlock_infer" / "config.pbtxt")
    assert {i.name for i in infer.input} == set(FIELDS) - {"stream"} and not infer.model_transaction_policy.decoupled
    assert not [name for name in read_manifest(repository)["files"] if "__pycache__" in name]


def test_documents_name_every_limit():
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for flag in (
        "--max-batch",
        "--max-queue",
        "--max-tokens",
        "--max-length",
        "--max-body",
        "--timeout",
        "--drain-seconds",
    ):
        assert flag in text
