"""The models that relay requests to the streaming model inside Triton (business logic scripting).

Triton 24.10 can't cancel such an inner request. So a second request cancels the first one in the streaming model when
its client has disconnected.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from oarlock.errors import RequestRefused
from oarlock.serve.triton.fastdeploy_json import read_form, use_form_names, write_form
from oarlock.serve.triton.fields import CANCEL, RELAYED, split_code
from oarlock.triton_repository.inputs import OUTPUTS

_POLL_SECONDS = 0.2
_MAX_KEPT = 1000


class _Relay:
    """The common part of both models."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read which model to ask."""
        self._engine = json.loads(args["model_config"])["parameters"]["engine"]["string_value"]
        self._open: dict[str, Callable[[], bool]] = {}  # id -> whether its client has disconnected
        self._lock = threading.Lock()
        self._kept: list[Any] = []  # for _release()
        threading.Thread(target=self._watch, name="oarlock-watch", daemon=True).start()

    @contextmanager
    def _ask(self, tensors: list[Any], is_cancelled: Callable[[], bool]) -> Iterator[Iterator[Any]]:
        """The engine's responses to these tensors. The last response is sent after this block has ended."""
        relayed = uuid.uuid4().hex
        inner = pb_utils.InferenceRequest(
            model_name=self._engine,
            requested_output_names=list(OUTPUTS),
            inputs=tensors,
            parameters={RELAYED: relayed},
        )
        with self._lock:
            self._open[relayed] = is_cancelled
        responses = None
        try:
            responses = inner.exec(decoupled=True)
            yield iter(responses)
        finally:
            with self._lock:
                self._open.pop(relayed, None)
            self._release(responses, is_cancelled)

    def _release(self, responses: Any, is_cancelled: Callable[[], bool]) -> None:
        """Drop an iterator of responses, after Triton has dropped it.

        Python has to drop it last. Otherwise Triton's thread frees the tensors without the global interpreter lock
        (~PbTensor of python_backend before 24.12), which crashes Python 3.12, and earlier ones with bad luck. That
        thread works through one queue. So it has dropped the iterator when it answers a question that was asked after
        the last response.
        """
        with self._lock:
            finished, self._kept = [*self._kept, responses], []
        if is_cancelled():  # once known, this is answered without the queue: keep them until the next request
            with self._lock:
                self._kept = [*finished, *self._kept][-_MAX_KEPT:]

    def _watch(self) -> None:
        while True:
            time.sleep(_POLL_SECONDS)
            # Under the lock, since Triton crashes when asked about a request that has its last response.
            with self._lock:
                gone = [relayed for relayed, is_cancelled in self._open.items() if is_cancelled()]
                for relayed in gone:
                    del self._open[relayed]
            for relayed in gone:
                try:
                    inner = pb_utils.InferenceRequest(
                        model_name=self._engine,
                        requested_output_names=list(OUTPUTS),
                        inputs=[pb_utils.Tensor("text_input", np.array([b""], dtype=object))],
                        parameters={CANCEL: relayed},
                    )
                    for _ in inner.exec(decoupled=True):
                        pass
                except Exception:  # the other requests need this thread
                    traceback.print_exc()


class JsonModel(_Relay):
    """FastDeploy's form: IN -> OUT, one response per chunk."""

    def execute(self, requests: list[Any]) -> None:
        """Answer each in a thread of its own. There are no more than the engine has slots and queue for."""
        for request in requests:
            sender, coded = request.get_response_sender(), _wants_codes(request)
            try:
                (text,) = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy().reshape(-1)
                tensors, req_id = read_form(text)
            except RequestRefused as error:
                _send_error(sender, _make_error("INVALID_ARG", str(error), coded))
            except Exception as error:
                _send_error(sender, _make_error("INVALID_ARG", f"IN: malformed: {error}", coded))
            else:
                inputs = [pb_utils.Tensor(name, tensor) for name, tensor in tensors.items()]
                threading.Thread(target=self._answer, args=(sender, inputs, req_id, coded), daemon=True).start()

    def _answer(self, sender: Any, inputs: list[Any], req_id: Any, coded: bool) -> None:
        failure = None
        try:
            with self._ask(inputs, sender.is_cancelled) as responses:
                for send_idx, response in enumerate(responses):
                    if response.has_error():
                        failure = _convert_error(response.error(), coded, use_form_names)
                    elif response.output_tensors():
                        arrays = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
                        text, token_ids = arrays["text_output"][0].decode("utf-8"), arrays["token_ids"].tolist()
                        out = write_form(text, token_ids, req_id, send_idx, bool(arrays["finish_reason"][0]))
                        tensor = pb_utils.Tensor("OUT", np.array([out], dtype=object))
                        sender.send(pb_utils.InferenceResponse([tensor]))
        except Exception as error:
            traceback.print_exc()
            failure = _make_error("INTERNAL", str(error), coded)
        if failure is not None:
            _send_error(sender, failure)
        else:
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class InferModel(_Relay):
    """One request, one response, with the tensors of the streaming model."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer one after another: Triton has several copies of this model."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        coded = _wants_codes(request)
        try:
            with self._ask(list(request.inputs()), request.is_cancelled) as responses:
                found = [response for response in responses if response.has_error() or response.output_tensors()]
        except Exception as error:
            traceback.print_exc()
            return _make_failure(_make_error("INTERNAL", str(error), coded))
        if not found:
            return _make_failure(_make_error("CANCELLED", "the request was cancelled", coded))
        if found[0].has_error():
            return _make_failure(_convert_error(found[0].error(), coded))
        wanted = set(request.requested_output_names() or OUTPUTS)
        return pb_utils.InferenceResponse([t for t in found[0].output_tensors() if t.name() in wanted])


def _wants_codes(request: Any) -> bool:
    """Read whether errors of a request need their code in the text. In a stream they have none otherwise."""
    return RELAYED in json.loads(request.parameters() or "{}")


def _make_error(code: str, message: str, coded: bool) -> Any:
    return pb_utils.TritonError(f"{code}: {message}" if coded else message, getattr(pb_utils.TritonError, code))


def _convert_error(error: Any, coded: bool, rename: Callable[[str], str] = str) -> Any:
    """Convert an error of the engine, whose text has the code. Triton's own errors have none."""
    code, message = split_code(error.message())
    return _make_error(code, rename(message), coded) if code else error


def _make_failure(error: Any) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=error)


def _send_error(sender: Any, error: Any) -> None:
    sender.send(_make_failure(error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
