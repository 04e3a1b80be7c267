"""How a server starts, reloads its model, and stops. Runs last of the serving tests, by its name: it stops their server."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import signal
import socket
import stat
import threading
from pathlib import Path

import pytest
import requests
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from helpers import ROOT, make_tiny_model
from oarlock.export.manifest import read_manifest
from oarlock.triton_repository.config_pbtxt import read_triton_config
from serving import (
    CONTEXT,
    ENDLESS,
    GUARD_S,
    KEY,
    GrpcStream,
    Server,
    find_listeners,
    free_ports,
    have_exited,
    is_free,
    tensor,
    wait_until,
)


def test_reload_under_load_loses_no_request(server, client):
    """200 requests from 16 clients while the model is reloaded."""
    expected = server.generate(text_input="river", max_tokens=16)["text_output"]
    before = set(server.processes())
    reloaded = threading.Event()
    done = []

    def reload():
        done.append(server.admin("reload"))
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
            made = over_grpc.infer("oarlock_infer", inputs, headers=server.headers)
            return made.as_numpy("text_output")[0].decode()

    loader = threading.Thread(target=reload)
    loader.start()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(200)))
        while not reloaded.is_set():  # some of them also after the reload
            answers += pool.map(ask, range(16))
        answers += pool.map(ask, range(32))
    loader.join()
    assert done[0].returncode == 0 and "oarlock was loaded again" in done[0].stdout, done
    assert len(answers) >= 200 and set(answers) == {expected}
    assert len(set(server.processes()) - before) == 1  # the model's new process


def test_admin_commands(server):
    """Only the user of the server may send them, and only served names are accepted."""
    socket_file = Path(server.admin_socket)
    assert (
        stat.S_IMODE(socket_file.stat().st_mode) == 0o600 and stat.S_IMODE(socket_file.parent.stat().st_mode) == 0o700
    )
    assert json.loads(server.admin("status").stdout)["models"]["oarlock_json"] == "READY"
    for words, said in (
        (["load", "evil"], "there is no model 'evil' here"),
        (["reload", "../oarlock"], "there is no model '../oarlock' here"),
        (["unload", "oarlock"], "has the engine, which answers all requests"),
    ):
        done = server.admin(*words)
        assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr
    assert server.admin("unload", "oarlock_json").returncode == 0
    with pytest.raises(InferenceServerException):
        list(GrpcStream(server).ask("oarlock_json", [tensor("IN", ['{"text": "x", "max_dec_len": 1}'], "BYTES")]))
    assert server.admin("load", "oarlock_json").returncode == 0
    (part,) = GrpcStream(server).ask("oarlock_json", [tensor("IN", ['{"text": "x", "max_dec_len": 1}'], "BYTES")])
    assert json.loads(part.as_numpy("OUT")[0])["is_end"] == 1


def test_sighup_replaces_keys_and_no_process_shows_them(server):
    """A file without a key keeps the old ones."""
    file = server.log.parent / "keys"
    whole = file.read_text()

    def status(key):
        made = requests.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=GUARD_S)
        rest = requests.get(f"{server.rest_url}/v2", headers={"Authorization": f"Bearer {key}"}, timeout=GUARD_S)
        assert made.status_code == rest.status_code
        return made.status_code

    def hang_up(words):
        count = server.said().count(words)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.said().count(words) > count, server.said)

    file.write_text("\n# none\n")
    hang_up("the keys are unchanged")
    assert status(KEY) == 200
    file.write_text("a-second-key\n")
    file.chmod(0o644)
    hang_up("1 key(s) of")
    assert "other users may read it (mode 0644)" in server.said()
    wait_until(lambda: status("a-second-key") == 200)
    assert status(KEY) == 401
    file.chmod(0o600)
    file.write_text(whole)
    assert server.admin("keys").returncode == 0
    wait_until(lambda: status(KEY) == 200)
    for pid in [server.process.pid, *server.processes()]:
        shown = b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
        assert KEY.encode() not in shown and b"a-second-key" not in shown and b"other-key" not in shown
    assert KEY not in server.said() and "a-second-key" not in server.said()


def test_files_and_shared_memory_are_private(server):
    run = Path(server.admin_socket).parent
    found = [*run.rglob("*"), *(Path("/dev/shm") / name for name in server.memory())]
    assert len(server.memory()) >= 3 and len(found) > 20
    own = [path for path in found if not path.is_symlink()]
    assert not [path for path in own if path.lstat().st_mode & 0o077]


def test_sigterm_finishes_open_requests_and_leaves_nothing(server, client):
    """The last test of this server."""
    processes = server.processes()
    assert len(processes) > 3 and server.memory()
    answers = []

    began = threading.Barrier(3, timeout=GUARD_S)
    tokens = 4000  # more than any machine generates before the signal

    def ask():
        content = {"text_input": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        address = f"{server.rest_url}/v2/models/oarlock/generate_stream"
        with requests.post(address, json=content, headers=server.headers, stream=True, timeout=GUARD_S) as answer:
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
    assert have_exited(processes) and not server.memory()
    assert all(is_free(port) for port in server.ports)
    assert "Traceback" not in server.said()


def test_serving_on_all_interfaces_and_sigkill(served_model, tmp_path):
    """Keys from the environment work on all ports; then the first process alone gets SIGKILL.

    Started on a model folder, which is exported by the way, and again when it has changed.
    """
    model = tmp_path / "model"
    shutil.copytree(served_model, model)
    words = ("--host", "0.0.0.0", "--timeout", "2", "--max-tokens", str(ENDLESS["max_tokens"]))
    environment = {"OARLOCK_API_KEYS": "one-of-the-test, other-key-of-the-test"}
    running = Server(model, tmp_path / "log", words, "other-key-of-the-test", environment)
    try:
        running.wait_ready()
        assert "open on 0.0.0.0 without TLS" in running.said() and "without keys" not in running.said()
        assert all(found and found <= {"0.0.0.0", "::"} for found in map(find_listeners, running.ports)), running.ports
        for address in (
            f"{running.url}/v1/models",
            f"{running.rest_url}/v2",
            f"http://127.0.0.1:{running.metrics}/metrics",
        ):
            for headers, status in (({}, 401), (running.headers, 200)):
                assert requests.get(address, headers=headers, timeout=GUARD_S).status_code == status, address
        assert requests.get(f"{running.rest_url}/v2/health/ready", timeout=GUARD_S).status_code == 200
        with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
            grpcclient.InferenceServerClient(running.grpc_url).get_server_metadata()
        load = requests.post(f"{running.rest_url}/v2/repository/models/oarlock/load", headers=running.headers, json={})
        assert load.status_code == 404
        late = requests.post(
            f"{running.rest_url}/v2/models/oarlock/generate",
            json={"text_input": "x", **ENDLESS},
            headers=running.headers,
            timeout=GUARD_S,
        )
        assert late.status_code >= 400 and "longer than the 2 seconds" in late.text
        processes = running.processes()
        assert not [pid for pid in processes if b"key-of-the-test" in Path(f"/proc/{pid}/environ").read_bytes()]
        first = running.generate(text_input="river", max_tokens=8)["token_ids"]
        make_tiny_model(model, max_position_embeddings=CONTEXT, num_hidden_layers=2)
        done = running.admin("reload")
        assert done.returncode == 0, done.stderr
        second = running.generate(text_input="river", max_tokens=8)["token_ids"]
        assert second != first
        (model / "config.json").write_text("{")
        done = running.admin("reload")
        assert done.returncode == 1 and f"{model}/config.json" in done.stderr and "Traceback" not in done.stderr
        assert running.generate(text_input="river", max_tokens=8)["token_ids"] == second
        processes = running.processes()
    finally:
        running.process.kill()
        running.process.wait()
    assert have_exited(processes)
    wait_until(lambda: not running.memory() and not list(model.parent.glob(".*")))
    assert not Path(running.admin_socket).parent.exists()


def test_a_load_failure_is_reported_once(repository, tmp_path):
    broken = tmp_path / "repository"
    shutil.copytree(repository, broken)
    (broken / "oarlock" / "1" / "model" / "config.json").write_text("{")
    running = Server(broken, tmp_path / "log")
    assert running.process.wait(GUARD_S) == 1
    assert running.said().count(f"{broken}/oarlock/1/model/config.json:1: not valid JSON") == 1, running.said()
    assert "oarlock: error: the model does not load:" in running.said() and not running.memory()


def test_a_port_in_use_is_reported_before_the_start(repository, tmp_path):
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


def test_triton_parses_the_model_configurations(repository):
    """Triton's own protobuf parses them, and the fields in the code match the configuration."""
    from tritonclient.grpc.model_config_pb2 import DataType

    from oarlock.triton_repository.inputs import INPUTS, OUTPUTS

    config = read_triton_config(repository / "oarlock" / "config.pbtxt")
    declared = {name: (f"TYPE_{tensor.datatype}", tensor.is_list) for name, tensor in INPUTS.items()}
    assert {i.name: (DataType.Name(i.data_type), list(i.dims) == [-1]) for i in config.input} == declared
    assert [o.name for o in config.output] == list(OUTPUTS) and config.model_transaction_policy.decoupled
    infer = read_triton_config(repository / "oarlock_infer" / "config.pbtxt")
    assert {i.name for i in infer.input} == set(INPUTS) - {"stream"} and not infer.model_transaction_policy.decoupled
    manifest = read_manifest(repository)
    assert not [name for name in manifest["files"] if "__pycache__" in name]
    copied = [name for name in manifest["files"] if name.startswith(("oarlock/1/model/", "oarlock/1/adapters/"))]
    assert manifest["proof"] == {"same_files": len(copied)} and manifest["source"]["adapters"]


def test_the_documentation_lists_every_limit():
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for flag in (
        "--max-batch",
        "--max-queue",
        "--max-tokens",
        "--max-length",
        "--max-body",
        "--timeout",
        "--drain-seconds",
        "--max-open",
        "--max-open-per-client",
        "--parse-special-tokens",
    ):
        assert flag in text
