"""The example clients and the Metaflow flow of deploy/."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from oarlock.cli.main import make_parser
from oarlock.config import FinetuneConfig, load_config
from oarlock.triton_repository.inputs import INPUTS
from support.deploy_folder import DEPLOY

# clients, with a server that answers as Triton and OpenAI do (tests of oarlock serve use the real ones)


class Answers(BaseHTTPRequestHandler):
    asked: list[tuple[str, dict[str, Any]]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        question = body["messages"][0]["content"] if "messages" in body else body["text_input"]
        streams = self.path.endswith("generate_stream") or body.get("stream") is True
        if "fail" in question:
            self.reply(400, "application/json", json.dumps({"error": {"message": "too long"}}))
        elif "messages" in body and not streams:
            choice = {"index": 0, "message": {"role": "assistant", "content": "an answer"}, "finish_reason": "stop"}
            self.reply(
                200,
                "application/json",
                json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}),
            )
        elif streams:
            self.reply(
                200,
                "text/event-stream",
                "".join(f"data: {json.dumps({'text_output': text})}\n\n" for text in ("an ", "answer")),
            )
        else:
            self.reply(200, "application/json", json.dumps({"model_name": "m", "text_output": "an answer"}))

    def reply(self, status: int, kind: str, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Answers,), {"asked": []})
    with HTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", handler.asked
        http.shutdown()


QUESTION = 'say "hi"\nand \\ é 山'


@pytest.mark.parametrize("client", [["rest.py"], ["rest.py", "--stream"], ["rest.sh"], ["generate.sh"]], ids=" ".join)
def test_clients_ask_and_print_the_answer(server, client):
    url, asked = server
    script = DEPLOY / "clients" / client[0]
    if script.suffix == ".py":
        words = [sys.executable, str(script), "--url", url, "--model", "m", "--max-tokens", "5", *client[1:]]
    else:
        words = ["bash", str(script)]
    environment = {**os.environ, "URL": url, "MODEL": "m", "MAX_TOKENS": "5", "PYTHON": sys.executable, "no_proxy": "*"}
    result = subprocess.run([*words, QUESTION], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "an answer\n"), result.stderr
    (path, body), streams = asked[0], len(client) > 1 or client[0] == "generate.sh"
    assert path == f"/v2/models/m/generate{'_stream' * streams}"
    wanted = {"text_input": QUESTION, "chat": True, "max_tokens": 5, "temperature": 0.0}
    assert {key: body[key] for key in wanted} == wanted and body.get("stream", False) is streams
    failed = subprocess.run([*words, "fail"], env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode != 0 and "too long" in failed.stderr and not failed.stdout.strip()


def test_the_grpc_client_sends_what_the_model_declares():
    """The names and dtypes of its tensors, read from its code, are those of the model's inputs."""
    tree = ast.parse((DEPLOY / "clients/grpc_client.py").read_text())
    sent = {
        call.args[0].value: call.args[1].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "tensor"
    }
    declared = {name: tensor.datatype.replace("STRING", "BYTES") for name, tensor in INPUTS.items()}
    assert sent and sent.items() <= declared.items()


# Metaflow

FAKE_METAFLOW = """
import sys
class Parameter:
    def __init__(self, name, default=None, **_): self.default = default
class _Current: run_id = "7"
current = _Current()
def _same(function=None, **_): return function if function else (lambda f: f)
step = retry = resources = _same
class FlowSpec:
    def __init__(self):
        given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
        for name, value in list(vars(type(self)).items()):
            if isinstance(value, Parameter): setattr(self, name, given.get("--" + name, value.default))
        self._next = self.start
        while self._next: self._run()
    def _run(self):
        now, self._next = self._next, None
        now()
    def next(self, step): self._next = step
"""


def test_the_flow_runs_commands_that_the_programs_accept(tmp_path):
    (tmp_path / "metaflow.py").write_text(FAKE_METAFLOW)
    fake = tmp_path / "sitecustomize.py"
    fake.write_text(
        "import json, pathlib, subprocess\n"
        "def run(words, check):\n"
        "    with open('asked.jsonl', 'a') as file: file.write(json.dumps(words) + '\\n')\n"
        "    if words[1] == 'export':\n"
        "        folder = pathlib.Path(words[-1]); folder.mkdir(parents=True)\n"
        "        (folder / 'oarlock_export.json').write_text('{}')\n"
        "subprocess.run = run\n"
    )
    words = [sys.executable, str(DEPLOY / "metaflow/flow.py"), "run", "--model", "m", "--data", "d", "--output", "out"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "exported to out/flow-7/triton\n", result.stderr
    train, export = map(json.loads, (tmp_path / "asked.jsonl").read_text().splitlines())
    config = load_config(FinetuneConfig, train[2:]).config
    assert train[1] == "llm/finetune_generation.py" and config.model.model_name_or_path == "m"
    arguments = make_parser().parse_args(export[1:])
    assert (arguments.adapter, arguments.target) == (["out/flow-7/lora"], "triton")
