"""The inputs and outputs of the served models, against which requests are checked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import grpc
from tritonclient.grpc import service_pb2
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from oarlock.serve.triton.client import TritonClient, TritonFailure
from oarlock.triton_repository.inputs import INPUTS

_VALID_SECONDS, _CALL_SECONDS = 2.0, 5.0

# The content of a model's inputs: tensors of triton_repository/inputs.py, FastDeploy's JSON form, or unknown.
Content = Literal["fields", "form", "other"]


@dataclass(frozen=True)
class InputForm:
    """One input: its datatype as requests write it ("BYTES", "INT32"), and its shape (-1 for any size)."""

    datatype: str
    dims: tuple[int, ...]
    optional: bool


@dataclass(frozen=True)
class ModelForm:
    """One model.

    Attributes:
        max_batch_size: limit of the dimension before those of the inputs; 0 if there is none.
        decoupled: whether a request may have any number of responses.
    """

    name: str
    inputs: Mapping[str, InputForm]
    outputs: tuple[str, ...]
    content: Content
    max_batch_size: int = 0
    decoupled: bool = False

    @classmethod
    def from_config(cls, config: ModelConfig) -> ModelForm:
        """Read Triton's configuration of a model."""
        inputs = {}
        for one in config.input:
            datatype = DataType.Name(one.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
            inputs[one.name] = InputForm(datatype, tuple(one.dims), one.optional)
        outputs = tuple(one.name for one in config.output)
        content: Content = "other"
        if config.max_batch_size == 0 and config.backend == "python":
            if "text_input" in inputs and set(inputs) <= set(INPUTS):
                content = "fields"
            elif (set(inputs), outputs) == ({"IN"}, ("OUT",)):
                content = "form"
        decoupled = config.model_transaction_policy.decoupled
        return cls(config.name, inputs, outputs, content, config.max_batch_size, decoupled)


@dataclass(frozen=True)
class RequestLimits:
    """The limits of requests.

    Attributes:
        models: by name.
        max_body: bytes of all contents of a request.
    """

    models: Mapping[str, ModelForm]
    max_body: int


class ModelForms:
    """The forms of a server's models. Triton is asked for them now and then, since models may be replaced."""

    def __init__(self, triton: TritonClient, models: Sequence[str], max_body: int) -> None:
        """Start with no models known; they are asked for when they are needed."""
        self._triton, self._models = triton, tuple(models)
        self._limits = RequestLimits({}, max_body)
        self._valid_until = 0.0
        self._asking = asyncio.Lock()

    async def get_limits(self) -> RequestLimits:
        """Get the limits of requests to the models that Triton has now.

        Raises:
            TritonFailure: when Triton is away, and has not answered before.
        """
        if time.monotonic() < self._valid_until:
            return self._limits
        async with self._asking:
            if time.monotonic() < self._valid_until:  # another request has asked meanwhile
                return self._limits
            found = {}
            for name in self._models:
                request = service_pb2.ModelConfigRequest(name=name)
                try:
                    answer = await self._triton.call("ModelConfig", request, timeout=_CALL_SECONDS)
                except TritonFailure as error:
                    if name in self._limits.models:  # its form is the same; Triton says itself whether it is there
                        found[name] = self._limits.models[name]
                    elif error.code != grpc.StatusCode.NOT_FOUND:
                        raise
                else:
                    found[name] = ModelForm.from_config(answer.config)
            self._limits = RequestLimits(found, self._limits.max_body)
            if len(found) == len(self._models):  # one that is missing may be loaded at any time, and is asked for again
                self._valid_until = time.monotonic() + _VALID_SECONDS
            return self._limits
