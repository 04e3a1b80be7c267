"""The streaming model that Triton's Python backend runs: requests into the engine, chunks out of it.

Triton calls execute() from one thread, and the engine makes chunks in its own. A third thread sends them to Triton, so
that neither waits for it. It joins chunks that wait to be sent, and checks now and then for clients that have
disconnected.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from oarlock.environment.console import get_logger
from oarlock.errors import OarlockError, RequestRefused
from oarlock.serve.config import SETTINGS_VARIABLE, EngineConfig
from oarlock.serve.engine.engine import Engine
from oarlock.serve.engine.running_request import RunningRequest
from oarlock.serve.request import QueueFull, TokenChunk, join_chunks
from oarlock.serve.supervision.run_folder import RUN_VARIABLE, open_busy_file, write_failure
from oarlock.serve.triton.fields import CANCEL, DEFAULT_TOKENS, RELAYED, read_request
from oarlock.triton_repository.inputs import OUTPUTS

logger = get_logger(__name__)

_POLL_SECONDS = 0.2  # between checks for clients that have disconnected


@dataclass(eq=False)
class _OpenRequest:
    """A request that is being answered."""

    sender: Any
    stream: bool
    outputs: frozenset[str]
    relayed: str
    unsent: list[TokenChunk] = field(default_factory=list)
    running: RunningRequest | None = None


class StreamingModel:
    """Triton makes one of these for each version of the model that it loads."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model in the folder of model.py."""
        folder = Path(args["model_repository"]) / args["model_version"]
        try:
            parameters = json.loads(args["model_config"])["parameters"]
            self._config = EngineConfig.from_parameters(
                {name: value["string_value"] for name, value in parameters.items()},
                overrides=json.loads(os.environ.get(SETTINGS_VARIABLE) or "{}"),
            )
            adapters = {path.name: path for path in sorted((folder / "adapters").glob("*")) if path.is_dir()}
            self._engine = Engine.load(folder / "model", adapters, self._config)
        except OarlockError as error:
            write_failure(str(error))
            raise pb_utils.TritonModelException(str(error)) from None
        except Exception as error:
            traceback.print_exc()
            write_failure(f"{type(error).__name__}: {error}")
            raise
        # In `oarlock serve`, requests come through the front alone, which has checked them. Other Triton servers have
        # ports of their own.
        self._checks_requests = RUN_VARIABLE not in os.environ
        self._open: set[_OpenRequest] = set()
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[tuple[_OpenRequest, TokenChunk] | None] = queue.SimpleQueue()
        self._busy_file = open_busy_file(os.getpid())
        self._metrics = _Metrics(args["model_name"])
        self._write_busy()
        self._sender = threading.Thread(target=self._send_all, name="oarlock-sender", daemon=True)
        self._sender.start()

    def execute(self, requests: list[Any]) -> None:
        """Put requests into the engine. Those that are wrong are answered at once."""
        for request in requests:
            sender = request.get_response_sender()
            parameters = json.loads(request.parameters() or "{}")
            relayed = str(parameters.get(RELAYED, ""))
            try:
                if CANCEL in parameters:
                    with self._lock:
                        found = [opened for opened in self._open if opened.relayed == str(parameters[CANCEL])]
                    for opened in found:
                        if opened.relayed and opened.running:
                            opened.running.cancel()
                    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                else:
                    self._submit(request, sender, relayed, parameters.get(DEFAULT_TOKENS))
            except RequestRefused as error:
                _send_error(sender, "INVALID_ARG", str(error), relayed)
            except QueueFull as error:
                _send_error(sender, "UNAVAILABLE", str(error), relayed)
            except Exception as error:
                traceback.print_exc()
                _send_error(sender, "INTERNAL", f"{type(error).__name__}: {error}", relayed)

    def finalize(self) -> None:
        """Answer all open requests, then end."""
        self._engine.close(drain=True)
        self._outbox.put(None)
        self._sender.join()

    # requests

    def _submit(self, request: Any, sender: Any, relayed: str, default_tokens: Any) -> None:
        asked = read_request(_read_tensors(request), self._config.max_body, default_tokens)
        if self._checks_requests:
            asked.check()
        opened = _OpenRequest(sender, asked.stream, frozenset(request.requested_output_names() or OUTPUTS), relayed)
        with self._lock:
            self._open.add(opened)
        self._write_busy()
        try:
            opened.running = self._engine.submit(
                asked.prompt, asked.sampling, lambda chunk: self._outbox.put((opened, chunk))
            )
        except BaseException:
            self._close(opened)
            raise

    def _close(self, opened: _OpenRequest) -> None:
        with self._lock:
            self._open.discard(opened)
        self._write_busy()

    def _write_busy(self) -> None:
        if self._busy_file is not None:
            os.pwrite(self._busy_file, f"{len(self._open):8d}".encode(), 0)

    # chunks

    def _send_all(self) -> None:
        next_poll = time.monotonic() + _POLL_SECONDS
        is_open = True
        while is_open:
            items = []
            with contextlib.suppress(queue.Empty):
                items.append(self._outbox.get(timeout=max(0.0, next_poll - time.monotonic())))
            while items and not self._outbox.empty():  # this thread alone takes items out
                items.append(self._outbox.get())
            is_open = None not in items
            try:
                chunks = [item for item in items if item is not None]
                for opened, chunk in chunks:
                    opened.unsent.append(chunk)
                for opened in dict.fromkeys(opened for opened, _ in chunks):
                    is_last = opened.unsent[-1].finish_reason is not None
                    if opened.stream or is_last:
                        self._send(opened, join_chunks(opened.unsent))
                        opened.unsent = []
                    if is_last:
                        self._close(opened)
                if count := sum(len(chunk.token_ids) for _, chunk in chunks):
                    self._metrics.answered_tokens.increment(count)
                if time.monotonic() >= next_poll:
                    with self._lock:
                        waiting = list(self._open)
                    self._metrics.open_requests.set(len(waiting))
                    for opened in waiting:
                        if opened.running and opened.sender.is_cancelled():
                            opened.running.cancel()
                    next_poll = time.monotonic() + _POLL_SECONDS
            except Exception:  # whatever it is, the other requests need this thread
                traceback.print_exc()

    def _send(self, opened: _OpenRequest, chunk: TokenChunk) -> None:
        try:
            if chunk.finish_reason == "error":
                _send_error(opened.sender, "INTERNAL", chunk.error, opened.relayed)
            elif chunk.finish_reason == "cancelled":
                _send_error(opened.sender, "CANCELLED", "the request was cancelled", opened.relayed)
            else:
                flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if chunk.finish_reason else 0
                values = {
                    "text_output": np.array([chunk.text.encode("utf-8", "replace")], dtype=object),
                    "token_ids": np.array(chunk.token_ids, dtype=np.int32),
                    "finish_reason": np.array([(chunk.finish_reason or "").encode()], dtype=object),
                    "prompt_tokens": np.array([chunk.prompt_tokens], dtype=np.int32),
                    "completion_tokens": np.array([chunk.completion_tokens], dtype=np.int32),
                }
                outputs = [pb_utils.Tensor(name, value) for name, value in values.items() if name in opened.outputs]
                opened.sender.send(pb_utils.InferenceResponse(outputs), flags=flags)
        except Exception as error:
            logger.info(f"a response could not be sent: {error}")
            if opened.running:
                opened.running.cancel()


class _Metrics:
    """The engine's metrics on Triton's metrics port."""

    def __init__(self, model: str) -> None:
        kinds = pb_utils.MetricFamily
        labels = {"model": model, "process": str(os.getpid())}
        self._families = [  # which have to live as long as their metrics
            kinds(name="oarlock_open_requests", description="Requests that are answered or wait", kind=kinds.GAUGE),
            kinds(name="oarlock_answered_tokens", description="Tokens of answers", kind=kinds.COUNTER),
        ]
        self.open_requests, self.answered_tokens = (family.Metric(labels=labels) for family in self._families)


def _read_tensors(request: Any) -> dict[str, np.ndarray]:
    tensors = {}
    for tensor in request.inputs():
        try:
            tensors[tensor.name()] = tensor.as_numpy()
        except Exception as error:  # its bytes are not what its type says
            raise RequestRefused(f"{tensor.name()}: malformed: {error}") from error
    return tensors


def _send_error(sender: Any, code: str, message: str, relayed: str) -> None:
    # Inside Triton 24.10 an error loses its code, so it is sent in the message.
    error = pb_utils.TritonError(f"{code}: {message}" if relayed else message, getattr(pb_utils.TritonError, code))
    sender.send(
        pb_utils.InferenceResponse(output_tensors=[], error=error),
        flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
    )
