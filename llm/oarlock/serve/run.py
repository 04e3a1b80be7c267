"""`oarlock serve`: Triton and its front as one tree of processes.

    oarlock serve ── tritonserver ── a process for each Python model (one has the engine)
                 ├── front: all ports; asks Triton over a Unix socket
                 └── guardian: clears up behind all of them

SIGTERM and Ctrl-C come to the first alone: it has the front finish what is open, then Triton. What ends by itself is
started again. When the first is killed, the kernel kills Triton and the front, and the guardian what is left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from oarlock.environment.console import get_logger
from oarlock.serve.front.options import FrontOptions
from oarlock.serve.options import ServeOptions
from oarlock.serve.supervision.admin_commands import Administration
from oarlock.serve.supervision.admin_socket import AdminServer
from oarlock.serve.supervision.listening import Listening
from oarlock.serve.supervision.process_tree import LOOK_SECONDS, ProcessTree
from oarlock.serve.supervision.run_folder import ADMIN_SOCKET, make_run_folder
from oarlock.serve.triton.repository import chat_temperature, engine_model, engine_settings
from oarlock.serve.triton.served_repository import ServedTree, make_served_tree
from oarlock.serve.triton.server import Installation, TritonOptions

logger = get_logger(__name__)


def serve(options: ServeOptions) -> int:
    """Until SIGTERM or Ctrl-C; 0 when all that was in flight was answered.

    Raises:
        OarlockError: when it can't start.
    """
    installation = Installation.find()
    engine_settings(options.repository, options.limits)  # what it refuses is refused now
    keys = options.keys.read()
    with contextlib.ExitStack() as opened:
        listening = Listening(options.host, options.ports)
        opened.callback(listening.close)
        run = make_run_folder(opened)
        served = make_served_tree(options.repository, run / "models")
        triton = TritonOptions(
            repository=served.folder,
            models=tuple(served.kinds),
            limits=options.limits,
            run=run,
            memory_prefix=f"oarlock-serve-{os.getpid()}-",
            drain_seconds=options.drain_seconds,
            verbose=options.verbose,
        )
        front = _front_options(options, triton, served, keys)
        _warn_of_an_open_network(front)
        tree = ProcessTree(installation, triton, options, front, listening, served)
        stopped, hung_up = opened.enter_context(_signals())
        opened.callback(tree.end)
        tree.start(stopped)
        administration = Administration(tree, options, served)
        with AdminServer(run / ADMIN_SOCKET, administration.actions()):
            if not stopped:
                _say_ready(front, run / ADMIN_SOCKET, tree.seconds)
            while not stopped:
                tree.check()
                if hung_up:
                    hung_up.clear()
                    administration.replace_keys_or_say_why_not()
                time.sleep(LOOK_SECONDS)
        return tree.drain(stopped)


def _front_options(
    options: ServeOptions, triton: TritonOptions, served: ServedTree, keys: tuple[str, ...]
) -> FrontOptions:
    settings = engine_settings(options.repository, options.limits)
    # One client alone may fill the model's queue, and is told so by it; others still get their own answer.
    places = settings.max_batch + settings.max_queue
    return FrontOptions(
        run=str(triton.run),
        triton_grpc=f"unix:{triton.grpc_socket}",
        triton_metrics=str(triton.metrics_socket),
        model=engine_model(options.repository),
        models=tuple(served.kinds),
        host=options.host,
        ports=options.ports,
        temperature=chat_temperature(options.repository),
        max_body=settings.max_body,
        max_tokens=settings.max_tokens,
        timeout=settings.timeout,
        max_open=options.max_open or 2 * places + 32,
        max_open_per_client=options.max_open_per_client or min(places + 16, options.max_open or places + 16),
        allowed_hosts=options.allowed_hosts,
        cors_origins=options.cors_origins,
        keys=keys,
        tls_certificate=str(options.tls_certificate or ""),
        tls_key=str(options.tls_key or ""),
        drain_seconds=options.drain_seconds,
    )


def _warn_of_an_open_network(front: FrontOptions) -> None:
    if front.is_local:
        return
    if not front.keys:
        logger.info(f"open on {front.host} without keys: whoever reaches it may ask the model (--api-key-file FILE)")
    if not front.has_tls:
        logger.info(
            f"open on {front.host} without TLS: others on the network may read prompts, answers and keys "
            "(--tls-certificate FILE --tls-key FILE)"
        )


def _say_ready(front: FrontOptions, admin: Path, seconds: float) -> None:
    host, ports, model = url_host(front.host), front.ports, front.model
    scheme = "https" if front.has_tls else "http"
    key = ' -H "Authorization: Bearer $KEY"' if front.keys else ""
    logger.info(
        f"ready after {seconds:.1f} s\n"
        f"  OpenAI   {scheme}://{host}:{ports.openai}/v1\n"
        f"  REST     {scheme}://{host}:{ports.rest}/v2/models/{model}/generate\n"
        f"  gRPC     {host}:{ports.grpc}{' (TLS)' if front.has_tls else ''}\n"
        f"  metrics  {scheme}://{host}:{ports.metrics}/metrics\n"
        f"  admin    oarlock admin --socket {admin} status\n"
        f"  try      curl {scheme}://{host}:{ports.openai}/v1/chat/completions{key}"
        " -H 'Content-Type: application/json'"
        f' -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}\''
    )


def url_host(host: str) -> str:
    """A host as it is reached from here, as it stands in a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


@contextlib.contextmanager
def _signals() -> Iterator[tuple[list[int], list[int]]]:
    """Those that came while in here: to stop, and SIGHUP."""
    came: tuple[list[int], list[int]] = ([], [])

    def note(number: int, _: FrameType | None) -> None:
        came[number == signal.SIGHUP].append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
