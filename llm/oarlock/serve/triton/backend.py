"""The streaming model that Triton's Python backend runs: requests into the engine, pieces out of it.

Triton calls execute() from one thread, the engine gives pieces from its own; a third one sends them, so that neither
waits for Triton. It joins pieces that wait for it, and looks now and then for clients that are gone.
"""

from __future__ import annotations

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
from oarlock.environment.paddle_import import import_paddle
from oarlock.errors import OarlockError
from oarlock.serve.engine.limits import Settings, busy_file, note_failure
from oarlock.serve.engine.request import Ticket
from oarlock.serve.engine.sampling_params import Answer, Limits, Piece, QueueFull, RequestRefused
from oarlock.serve.triton.fields import CANCEL, DEFAULT_TOKENS, OUTPUTS, RELAYED, read_fields

logger = get_logger(__name__)

_LOOK_SECONDS = 0.2  # between looks for clients that are gone


@dataclass(eq=False)
class _Open:
    """A request that is being answered."""

    sender: Any
    stream: bool
    outputs: frozenset[str]
    relayed: str
    answer: Answer = field(default_factory=Answer)  # what was not sent yet
    ticket: Ticket | None = None


class StreamingModel:
    """Triton makes one of these for each version of the model that it loads."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load what stands beside model.py."""
        folder = Path(args["model_repository"]) / args["model_version"]
        try:
            self._settings = Settings.read(
                {name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()}
            )
            import_paddle()
            from oarlock.serve.engine.engine import Engine

            adapters = {path.name: path for path in sorted((folder / "adapters").glob("*")) if path.is_dir()}
            limits = Limits(**self._settings.engine_limits())
            parsing = self._settings.parse_special_tokens
            self._engine = Engine.load(folder / "model", adapters, limits, parsing)
        except OarlockError as error:
            note_failure(str(error))
            raise pb_utils.TritonModelException(str(error)) from None
        except Exception as error:
            traceback.print_exc()
            note_failure(f"{type(error).__name__}: {error}")
            raise
        self._open: set[_Open] = set()
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[tuple[_Open, Piece] | None] = queue.SimpleQueue()
        self._busy_file = busy_file(os.getpid())
        self._metrics = _Metrics(args["model_name"])
        self._note_busy()
        self._sender = threading.Thread(target=self._send_all, name="oarlock-sender", daemon=True)
        self._sender.start()

    def execute(self, requests: list[Any]) -> None:
        """Put requests into the engine; what they ask wrongly is answered at once."""
        for request in requests:
            sender = request.get_response_sender()
            parameters = json.loads(request.parameters() or "{}")
            relayed = str(parameters.get(RELAYED, ""))
            try:
                if CANCEL in parameters:
                    self._cancel_relayed(str(parameters[CANCEL]))
                    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                else:
                    self._take(request, sender, relayed, parameters.get(DEFAULT_TOKENS))
            except RequestRefused as error:
                _send_error(sender, "INVALID_ARG", str(error), relayed)
            except QueueFull as error:
                _send_error(sender, "UNAVAILABLE", str(error), relayed)
            except Exception as error:
                traceback.print_exc()
                _send_error(sender, "INTERNAL", f"{type(error).__name__}: {error}", relayed)

    def finalize(self) -> None:
        """Answer what is here, then end."""
        self._engine.close(drain=True)
        self._outbox.put(None)
        self._sender.join()

    # taking in

    def _take(self, request: Any, sender: Any, relayed: str, default_tokens: Any) -> None:
        asked = read_fields(_tensors(request), self._settings.max_body, default_tokens)
        opened = _Open(sender, asked.stream, frozenset(request.requested_output_names() or OUTPUTS), relayed)
        with self._lock:
            self._open.add(opened)
        self._note_busy()
        try:
            opened.ticket = self._engine.submit(
                asked.prompt, asked.sampling, lambda piece: self._outbox.put((opened, piece))
            )
        except BaseException:
            self._leave(opened)
            raise

    def _cancel_relayed(self, relayed: str) -> None:
        with self._lock:
            found = [opened for opened in self._open if relayed and opened.relayed == relayed]
        for opened in found:
            if opened.ticket:
                opened.ticket.cancel()

    def _leave(self, opened: _Open) -> None:
        with self._lock:
            self._open.discard(opened)
        self._note_busy()

    def _note_busy(self) -> None:
        if self._busy_file is not None:
            os.pwrite(self._busy_file, f"{len(self._open):8d}".encode(), 0)

    # sending

    def _send_all(self) -> None:
        look = time.monotonic() + _LOOK_SECONDS
        going = True
        while going:
            items = self._wait_for_items(max(0.0, look - time.monotonic()))
            going = None not in items
            try:
                self._send_pieces([item for item in items if item is not None])
                if time.monotonic() >= look:
                    self._metrics.set_open(len(self._open))
                    self._cancel_for_the_gone()
                    look = time.monotonic() + _LOOK_SECONDS
            except Exception:  # whatever it is, the other requests need this thread
                traceback.print_exc()

    def _wait_for_items(self, seconds: float) -> list[tuple[_Open, Piece] | None]:
        try:
            items = [self._outbox.get(timeout=seconds)]
            while not self._outbox.empty():
                items.append(self._outbox.get())
        except queue.Empty:
            return []
        return items

    def _send_pieces(self, items: list[tuple[_Open, Piece]]) -> None:
        touched: dict[_Open, None] = {}
        for opened, piece in items:
            opened.answer.add(piece)
            touched[opened] = None
        for opened in touched:
            self._send(opened)
        self._metrics.add_tokens(sum(len(piece.token_ids) for _, piece in items))

    def _send(self, opened: _Open) -> None:
        answer = opened.answer
        done = answer.finish_reason is not None
        if not done and not opened.stream:
            return
        try:
            if answer.finish_reason == "error":
                _send_error(opened.sender, "INTERNAL", answer.error, opened.relayed)
            elif answer.finish_reason == "cancelled":
                _send_error(opened.sender, "CANCELLED", "the request was cancelled", opened.relayed)
            else:
                flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if done else 0
                opened.sender.send(pb_utils.InferenceResponse(_outputs(answer, opened.outputs)), flags=flags)
        except Exception as error:
            logger.info(f"a response could not be sent: {error}")
            if opened.ticket:
                opened.ticket.cancel()
        opened.answer = Answer()
        if done:
            self._leave(opened)

    def _cancel_for_the_gone(self) -> None:
        with self._lock:
            waiting = list(self._open)
        for opened in waiting:
            if opened.ticket and opened.sender.is_cancelled():
                opened.ticket.cancel()


class _Metrics:
    """What Triton's metrics port says of the engine, beside Triton's own figures."""

    def __init__(self, model: str) -> None:
        kinds = pb_utils.MetricFamily
        labels = {"model": model, "process": str(os.getpid())}
        self._families = [  # which have to live as long as their metrics
            kinds(name="oarlock_open_requests", description="Requests that are answered or wait", kind=kinds.GAUGE),
            kinds(name="oarlock_answered_tokens", description="Tokens of answers", kind=kinds.COUNTER),
        ]
        self._open, self._tokens = (family.Metric(labels=labels) for family in self._families)

    def set_open(self, count: int) -> None:
        """Requests that are open now."""
        self._open.set(count)

    def add_tokens(self, count: int) -> None:
        """That were sent."""
        if count:
            self._tokens.increment(count)


def _tensors(request: Any) -> dict[str, np.ndarray]:
    tensors = {}
    for tensor in request.inputs():
        try:
            tensors[tensor.name()] = tensor.as_numpy()
        except Exception as error:  # its bytes are not what its type says
            raise RequestRefused(f"{tensor.name()}: malformed: {error}") from error
    return tensors


def _outputs(answer: Answer, wanted: frozenset[str]) -> list[Any]:
    values = {
        "text_output": np.array([answer.text.encode("utf-8", "replace")], dtype=object),
        "token_ids": np.array(answer.token_ids, dtype=np.int32),
        "finish_reason": np.array([(answer.finish_reason or "").encode()], dtype=object),
        "prompt_tokens": np.array([answer.prompt_tokens], dtype=np.int32),
        "completion_tokens": np.array([answer.completion_tokens], dtype=np.int32),
    }
    return [pb_utils.Tensor(name, value) for name, value in values.items() if name in wanted]


def _send_error(sender: Any, code: str, message: str, relayed: str) -> None:
    # Inside of Triton 24.10 an error loses its code, so that it goes with the message there.
    error = pb_utils.TritonError(f"{code}: {message}" if relayed else message, getattr(pb_utils.TritonError, code))
    sender.send(
        pb_utils.InferenceResponse(output_tensors=[], error=error),
        flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
    )
