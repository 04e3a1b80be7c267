"""What requests to the models of a repository may hold, by their config.pbtxt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from oarlock.serve.triton_fields import FIELDS
from oarlock.triton_config import TRITON_CONFIG, read_triton_config

# How their contents are read: the tensors of triton_fields.FIELDS, FastDeploy's JSON form, or nothing known of them.
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
        inputs = {
            one.name: InputForm(_datatype(one.data_type), tuple(one.dims), one.optional) for one in config.input
        }
        outputs = tuple(one.name for one in config.output)
        reading: Reading = "other"
        if config.max_batch_size == 0 and config.backend == "python":
            if "text_input" in inputs and set(inputs) <= set(FIELDS):
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


def read_model_forms(repository: Path, models: tuple[str, ...]) -> dict[str, ModelForm]:
    """Of models in a repository.

    Raises:
        ModelError: when a config.pbtxt can't be read.
    """
    found = {}
    for name in models:
        config = read_triton_config(repository / name / TRITON_CONFIG)
        config.name = name  # Triton knows a model by its folder
        found[name] = ModelForm.of(config)
    return found


def _datatype(kind: int) -> str:
    """TYPE_INT32 -> INT32; strings are BYTES in requests."""
    return DataType.Name(kind).removeprefix("TYPE_").replace("STRING", "BYTES")
