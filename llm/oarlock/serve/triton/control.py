"""The first process's connection to Triton: probes it, and has it load and unload models. Over its Unix socket."""

from __future__ import annotations

import contextlib
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from oarlock.errors import ModelError

_OPTIONS = [  # it may be restarted at any time
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.enable_http_proxy", 0),
]
_PROBE_SECONDS = 2.0


class TritonControl:
    """One connection, with blocking calls."""

    def __init__(self, socket: Path) -> None:
        """Connect to the socket of Triton's gRPC, which need not exist yet."""
        self._socket = socket
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def is_ready(self) -> bool:
        if self._socket.exists():
            with contextlib.suppress(grpc.RpcError):
                return bool(self._stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=_PROBE_SECONDS).ready)
        return False

    def list_states(self) -> dict[str, str]:
        """The state of each model: READY, LOADING, UNLOADING, UNAVAILABLE. {} if Triton does not answer."""
        with contextlib.suppress(grpc.RpcError):
            index = self._stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=_PROBE_SECONDS)
            return {model.name: model.state for model in index.models}
        return {}

    def load(self, model: str, seconds: float) -> None:
        """Load a model. A loaded one of this name answers until the new one does.

        Raises:
            ModelError: when that fails.
        """
        request = service_pb2.RepositoryModelLoadRequest(model_name=model)
        try:
            self._stub.RepositoryModelLoad(request, timeout=seconds)
        except grpc.RpcError as error:
            raise ModelError(f"{model} was not loaded: {error.details() or error.code().name}") from error

    def unload(self, model: str, seconds: float) -> None:
        """Unload a model when its requests have been answered.

        Raises:
            ModelError: when Triton does not answer.
        """
        request = service_pb2.RepositoryModelUnloadRequest(model_name=model)
        try:
            self._stub.RepositoryModelUnload(request, timeout=seconds)
        except grpc.RpcError as error:
            raise ModelError(f"{model} was not unloaded: {error.details() or error.code().name}") from error
