"""A server under load, and a server whose processes are killed. Runs before test_serving_stop.py, which stops the
server.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from pathlib import Path

import openai
import pytest
import requests
import tritonclient.grpc as grpcclient

from helpers import ROOT
from serving import ENDLESS, GUARD_S, KEY, GrpcStream, chat_tensors, is_alive, tensor, wait_until


def command_line(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


class _Ending(threading.Thread):
    """A stream that is read to its end."""

    def __init__(self, pieces):
        super().__init__(daemon=True)
        self._pieces, self._last, self.began = pieces, "", threading.Event()
        self.start()

    def run(self):
        try:
            for piece in self._pieces:
                self._last = piece
                self.began.set()
        except Exception as error:
            self._last = f"error: {error}"
        self.began.set()

    def ended(self):
        self.join(GUARD_S)
        assert not self.is_alive()
        return str(self._last)


@contextlib.contextmanager
def open_streams(server):
    """Open streams of endless answers in every protocol that streams."""
    where = ((f"{server.url}/v1/completions", {"model": "oarlock", "prompt": "x", "stream": True, **ENDLESS}),
             (f"{server.rest_url}/v2/models/oarlock/generate_stream", {"text_input": "x", "stream": True, **ENDLESS}))  # fmt: skip
    over_grpc = GrpcStream(server)
    pieces = over_grpc.ask("oarlock", chat_tensors("x", ENDLESS["max_tokens"], stream=True, ignore_eos=True))
    with contextlib.ExitStack() as opened:
        streams = [_Ending(pieces)]
        for address, content in where:
            made = requests.post(address, json=content, headers=server.headers, stream=True, timeout=GUARD_S)
            opened.enter_context(made)
            streams.append(_Ending(line.decode() for line in made.iter_lines() if line))
        for stream in streams:
            assert stream.began.wait(GUARD_S)
        yield streams
    with contextlib.suppress(Exception):  # it may have ended by itself
        over_grpc.close()


def all_routes_answer(server, client):
    tensors = [tensor("text_input", ["x"], "BYTES"), tensor("max_tokens", [2], "INT32")]
    with contextlib.suppress(Exception):
        client.completions.create(model="oarlock", prompt="x", max_tokens=2)
        server.generate(text_input="x", max_tokens=2)
        with grpcclient.InferenceServerClient(server.grpc_url) as over_grpc:
            for _ in range(9):  # each of its copies
                over_grpc.infer("oarlock_infer", tensors, headers=server.headers)
        list(GrpcStream(server).ask("oarlock_json", [tensor("IN", ['{"text": "x", "max_dec_len": 1}'], "BYTES")]))
        server.metric("oarlock_open_requests")
        return requests.get(f"{server.rest_url}/v2/health/ready", timeout=GUARD_S).status_code == 200
    return False


def test_hostile_and_valid_requests_leak_nothing(server, monkeypatch):
    """The load test in small: every request gets the expected answer, and no thread or open file remains."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "serving"))
    from load import run_load
    from load_outcome import Target
    from load_requests import Load

    target = Target(server.process.pid, server.openai, server.rest, server.grpc, KEY, "pirate", max_body=100_000)
    outcome = run_load(target, 20 * len(Load(target).hostile), 8, 0.05)
    assert outcome.num_unexpected == 0, outcome.unexpected
    assert len(outcome.answers) == len(Load(target).good) + len(Load(target).hostile)
    assert outcome.end.keys() == outcome.begin.keys()
    for name, (threads, files) in outcome.end.items():
        spare = 10 if name == "triton" else 2  # pools that grow up to their limit
        assert threads <= outcome.begin[name][0] + spare and files <= outcome.begin[name][1], (name, outcome)


def test_recovery_from_sigkill_of_each_process(server, client):
    """All routes recover; requests in between get 503 with Retry-After, and streams end with an error."""
    kinds = {"oarlock.serve.supervision.guardian": 1, "front.process": 1, "/oarlock_infer/": 8, "/oarlock_json/": 1, "/oarlock/1/": 1,
             "tritonserver": 1}  # fmt: skip
    for word, count in kinds.items():
        victims = [pid for pid in server.processes() if word in command_line(pid)]
        assert len(victims) == count, (word, [command_line(pid) for pid in server.processes()])
        memory = set(server.memory())
        with open_streams(server) as streams:
            os.kill(victims[-1], signal.SIGKILL)
            if word in ("/oarlock/1/", "tritonserver"):
                for stream in streams:
                    assert "error" in stream.ended(), word
                away = requests.post(
                    f"{server.rest_url}/v2/models/oarlock/generate",
                    json={"text_input": "x", "max_tokens": 2},
                    headers=server.headers,
                    timeout=GUARD_S,
                )
                assert away.status_code == 503 and int(away.headers["Retry-After"]) > 0
                with pytest.raises(openai.InternalServerError) as refused:
                    client.completions.create(model="oarlock", prompt="x", max_tokens=2)
                assert refused.value.status_code == 503 and int(refused.value.response.headers["Retry-After"]) > 0
        wait_until(lambda: all_routes_answer(server, client), server.said, seconds=120)
        wait_until(lambda victim=victims[-1]: not is_alive(victim), server.said)
        if word == "tritonserver":
            assert not memory & set(server.memory())
    restarts = json.loads(server.admin("status").stdout)["restarts"]
    assert restarts == {"triton": 2, "front": 1, "guardian": 1, "model": 2}, server.said()
    assert server.metric("oarlock_restarts_total", part="triton") == 2
