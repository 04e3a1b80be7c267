"""Runs `oarlock serve`: Triton and its front as one tree of processes.

    oarlock serve ── tritonserver ── a process for each Python model (one has the engine)
                 ├── front: all ports; calls Triton over a Unix socket
                 └── guardian: cleans up after all of them

SIGTERM and Ctrl-C reach the first process alone: it has the front finish the open requests, then Triton. What ends by
itself is restarted. When the first process is killed, the kernel kills Triton and the front, and the guardian the rest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

from oarlock.environment.console import get_logger
from oarlock.serve.config import FrontConfig, ServeConfig
from oarlock.serve.front.keys import KeySource
from oarlock.serve.supervision.admin_commands import Administration
from oarlock.serve.supervision.admin_socket import AdminServer
from oarlock.serve.supervision.listening import Listening
from oarlock.serve.supervision.process_tree import POLL_SECONDS, ProcessTree
from oarlock.serve.supervision.run_folder import ADMIN_SOCKET, make_run_folder
from oarlock.serve.triton.repository import find_engine_model, read_chat_temperature, read_engine_config
from oarlock.serve.triton.served_repository import make_served_tree
from oarlock.serve.triton.server import Installation

logger = get_logger(__name__)


def serve(
    config: ServeConfig,
    keys: KeySource,
    temporary: Path | None = None,
    refresh: Callable[[], None] | None = None,
) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns 0 if all open requests were answered.

    Args:
        config: what the user has set. What the repository says is added here.
        temporary: a folder that is removed when the server ends, however that comes.
        refresh: brings the repository up to date with its sources, before a model is loaded again.

    Raises:
        OarlockError: when it can't start.
    """
    installation = Installation.find()
    repository = Path(config.triton.repository)
    engine = read_engine_config(repository, config.triton.settings)  # refuses wrong settings early
    first_keys = keys.read()
    with contextlib.ExitStack() as opened:
        listening = Listening(config.front)
        opened.callback(listening.close)
        run = make_run_folder(opened)
        triton = replace(
            config.triton,
            model=find_engine_model(repository),
            run=str(run),
            memory_prefix=f"oarlock-serve-{os.getpid()}-",
        )
        served = make_served_tree(repository, triton.shown_repository)
        config = replace(
            config,
            engine=engine,
            triton=replace(triton, models=tuple(served.kinds)),
            front=replace(config.front, temperature=read_chat_temperature(repository)),
        )
        _warn_of_an_open_network(config.front, bool(first_keys))
        tree = ProcessTree(installation, config, first_keys, listening, served, temporary)
        stopped, hung_up = opened.enter_context(_catch_signals())
        opened.callback(tree.end)
        tree.start(stopped)
        administration = Administration(tree, served, keys, refresh)
        with AdminServer(run / ADMIN_SOCKET, administration.list_actions()):
            if not stopped:
                _report_ready(config, bool(first_keys), run / ADMIN_SOCKET, tree.seconds)
            while not stopped:
                tree.check()
                if hung_up:
                    hung_up.clear()
                    administration.replace_keys()
                time.sleep(POLL_SECONDS)
        return tree.drain(stopped)


def _warn_of_an_open_network(front: FrontConfig, with_keys: bool) -> None:
    if front.is_local:
        return
    if not with_keys:
        logger.info(f"open on {front.host} without keys: whoever reaches it may use the model (--api-key-file FILE)")
    if not front.has_tls:
        logger.info(
            f"open on {front.host} without TLS: others on the network may read prompts, answers and keys "
            "(--tls-certificate FILE --tls-key FILE)"
        )


def _report_ready(config: ServeConfig, with_keys: bool, admin: Path, seconds: float) -> None:
    front, model = config.front, config.triton.model
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(front.host, front.host)  # as it is reached from this machine
    host, scheme = f"[{host}]" if ":" in host else host, "https" if front.has_tls else "http"
    key = ' -H "Authorization: Bearer $KEY"' if with_keys else ""
    logger.info(
        f"ready after {seconds:.1f} s\n"
        f"  OpenAI   {scheme}://{host}:{front.openai_port}/v1\n"
        f"  REST     {scheme}://{host}:{front.rest_port}/v2/models/{model}/generate\n"
        f"  gRPC     {host}:{front.grpc_port}{' (TLS)' if front.has_tls else ''}\n"
        f"  metrics  {scheme}://{host}:{front.metrics_port}/metrics\n"
        f"  admin    oarlock admin --socket {admin} status\n"
        f"  try      curl {scheme}://{host}:{front.openai_port}/v1/chat/completions{key}"
        " -H 'Content-Type: application/json'"
        f' -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}\''
    )


@contextlib.contextmanager
def _catch_signals() -> Iterator[tuple[list[int], list[int]]]:
    """Collect signals inside of the block: those that stop the server, and SIGHUP."""
    came: tuple[list[int], list[int]] = ([], [])

    def note(number: int, _: FrameType | None) -> None:
        came[number == signal.SIGHUP].append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
