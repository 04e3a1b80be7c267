"""What requests to the models may hold, by their configurations."""

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

_KNOWN_SECONDS, _ASK_SECONDS = 2.0, 5.0

# What their contents are: tensors of triton_repository/inputs.py, FastDeploy's JSON form, or unknown.
Reading = Literal["fields", "form", "other"]


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
        max_batch_size: of the dimension before those of the inputs; 0 where there is none.
        decoupled: whether a request may have any number of responses.
    """

    name: str
    inputs: Mapping[str, InputForm]
    outputs: tuple[str, ...]
    reading: Reading
    max_batch_size: int = 0
    decoupled: bool = False

    @classmethod
    def of(cls, config: ModelConfig) -> ModelForm:
        """As a configuration has it."""
        inputs = {one.name: InputForm(_datatype(one.data_type), tuple(one.dims), one.optional) for one in config.input}
        outputs = tuple(one.name for one in config.output)
        reading: Reading = "other"
        if config.max_batch_size == 0 and config.backend == "python":
            if "text_input" in inputs and set(inputs) <= set(INPUTS):
                reading = "fields"
            elif (set(inputs), outputs) == ({"IN"}, ("OUT",)):
                reading = "form"
        decoupled = config.model_transaction_policy.decoupled
        return cls(config.name, inputs, outputs, reading, config.max_batch_size, decoupled)


@dataclass(frozen=True)
class RequestLimits:
    """What a request is held against.

    Attributes:
        models: by their names.
        max_body: bytes of all contents of a request.
    """

    models: Mapping[str, ModelForm]
    max_body: int


class ModelForms:
    """The forms of a server's models, as Triton has them now: asked for now and then, since models may be replaced."""

    def __init__(self, triton: TritonClient, models: Sequence[str], max_body: int) -> None:
        """Start with no models known; they are asked for when they are needed."""
        self._triton, self._models = triton, tuple(models)
        self._limits = RequestLimits({}, max_body)
        self._until = 0.0
        self._asking = asyncio.Lock()

    async def limits(self) -> RequestLimits:
        """What requests are held against.

        Raises:
            TritonFailure: when Triton is away, and never was there.
        """
        if time.monotonic() >= self._until:
            async with self._asking:
                if time.monotonic() >= self._until:
                    await self._ask()
        return self._limits

    async def _ask(self) -> None:
        found = {}
        for name in self._models:
            request = service_pb2.ModelConfigRequest(name=name)
            try:
                answer = await self._triton.call("ModelConfig", request, timeout=_ASK_SECONDS)
            except TritonFailure as error:
                if name in self._limits.models:  # what it took before; whether it is there is Triton's to say
                    found[name] = self._limits.models[name]
                elif error.code != grpc.StatusCode.NOT_FOUND:
                    raise
            else:
                found[name] = ModelForm.of(answer.config)
        self._limits = RequestLimits(found, self._limits.max_body)
        if len(found) == len(self._models):  # one that is missing may be loaded at any time, and is asked for again
            self._until = time.monotonic() + _KNOWN_SECONDS


def _datatype(kind: int) -> str:
    """TYPE_INT32 -> INT32; strings are BYTES in requests."""
    return DataType.Name(kind).removeprefix("TYPE_").replace("STRING", "BYTES")
