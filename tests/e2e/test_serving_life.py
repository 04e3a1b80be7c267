"""How a server begins, goes on with another model, and ends."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import signal
import socket
import threading
import time

import requests
import tritonclient.grpc as grpcclient

from helpers import ROOT
from oarlock.export.manifest import read_manifest
from oarlock.triton_config import read_triton_config
from serving import ENDLESS, GUARD_S, Server, free_ports, gone, is_free, listening, tensor


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

    began = threading.Barrier(3, timeout=GUARD_S)
    tokens = 4000  # which no machine makes between the first of them and the signal

    def ask():
        content = {"text_input": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        address = f"{server.rest_url}/v2/models/oarlock/generate_stream"
        with requests.post(address, json=content, stream=True, timeout=GUARD_S) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            began.wait()
            answers.append(json.loads(list(lines)[-1].removeprefix(b"data: "))["completion_tokens"])

    def ask_openai():
        chunks = iter(
            client.completions.create(
                model="oarlock",
                prompt="x",
                max_tokens=tokens + 1,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
        )
        next(chunks)
        began.wait()
        answers.append(list(chunks)[-1].usage.completion_tokens)

    threads = [threading.Thread(target=ask), threading.Thread(target=ask_openai)]
    for thread in threads:
        thread.start()
    began.wait()
    assert server.stop(signal.SIGTERM) == 0, server.said()
    for thread in threads:
        thread.join(GUARD_S)
    assert sorted(answers) == [tokens, tokens + 1], server.said()
    assert gone(processes) and not server.memory()
    assert all(is_free(port) for port in server.ports)
    assert "Traceback" not in server.said()


def test_an_open_host_and_an_end_by_sigkill(served_model, tmp_path):
    """Keys open the OpenAI side alone, and loading asks for its own; then SIGKILL of the first process alone.

    Started on a model folder, which is exported by the way.
    """
    for name in ("keys", "admin"):
        (tmp_path / name).write_text(f"{name}-of-the-test\n")
    words = ("--host", "0.0.0.0", "--api-key-file", str(tmp_path / "keys"), "--admin-key-file", str(tmp_path / "admin"))
    words += ("--timeout", "2", "--max-tokens", str(ENDLESS["max_tokens"]))
    running = Server(served_model, tmp_path / "log", words)
    try:
        running.wait_ready()
        assert [listening(port) for port in running.ports] == [{"0.0.0.0"}, *[{"127.0.0.1"}] * 3]
        load = f"{running.rest_url}/v2/repository/models/oarlock/load"
        for key, status in (("", 403), ("keys-of-the-test", 403), ("admin-of-the-test", 200)):
            assert requests.post(load, headers={"oarlock-admin-key": key}, timeout=GUARD_S).status_code == status
        processes = running.processes()
        late = requests.post(
            f"{running.rest_url}/v2/models/oarlock/generate", json={"text_input": "x", **ENDLESS}, timeout=GUARD_S
        )
        assert late.status_code >= 400 and "longer than the 2 seconds" in late.text
    finally:
        running.process.kill()
        running.process.wait()
    assert gone(processes)
    deadline = time.monotonic() + GUARD_S
    while (running.memory() or list(served_model.parent.glob(".*"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running.memory() and not list(served_model.parent.glob(".*"))


def test_a_model_that_does_not_load_says_why_once(repository, tmp_path):
    broken = tmp_path / "repository"
    shutil.copytree(repository, broken)
    (broken / "oarlock" / "1" / "model" / "config.json").write_text("{")
    running = Server(broken, tmp_path / "log")
    assert running.process.wait(GUARD_S) == 1
    assert running.said().count("config.json: not") == 1, running.said()
    assert "oarlock: error: the model does not load:" in running.said() and not running.memory()


def test_a_taken_port_is_said_before_the_start(repository, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        running = Server(
            repository,
            tmp_path / "log",
            ports=[*free_ports(3), taken.getsockname()[1]],
        )
        assert running.process.wait(GUARD_S) == 1
    assert "--metrics-port" in running.said() and "the port is taken" in running.said()


def test_the_configurations_are_what_the_models_read(repository):
    """Triton's own protobuf reads them, and the fields in code are those of the configuration."""
    from oarlock.serve.triton_fields import FIELDS, OUTPUTS

    kinds = {8: int, 9: int, 11: float, 13: str, 1: bool}  # TYPE_INT32, INT64, FP32, STRING, BOOL
    config = read_triton_config(repository / "oarlock" / "config.pbtxt")
    assert {i.name: (kinds[i.data_type], list(i.dims) == [-1]) for i in config.input} == FIELDS
    assert [o.name for o in config.output] == list(OUTPUTS) and config.model_transaction_policy.decoupled
    infer = read_triton_config(repository / "oarlock_infer" / "config.pbtxt")
    assert {i.name for i in infer.input} == set(FIELDS) - {"stream"} and not infer.model_transaction_policy.decoupled
    manifest = read_manifest(repository)
    assert not [name for name in manifest["files"] if "__pycache__" in name]
    copied = [name for name in manifest["files"] if name.startswith(("oarlock/1/model/", "oarlock/1/adapters/"))]
    assert manifest["proof"] == {"same_files": len(copied)} and manifest["source"]["adapters"]


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
        "--parse-special-tokens",
    ):
        assert flag in text
