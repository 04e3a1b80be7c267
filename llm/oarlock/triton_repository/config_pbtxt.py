"""Reads Triton's config.pbtxt with Triton's own protobuf. Does not import paddle."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from oarlock.errors import EnvironmentProblem, ModelError, first_line
from oarlock.formats.files import read_bytes
from oarlock.triton_repository.inputs import INPUTS
from oarlock.triton_repository.model_code import TEMPLATES

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

TRITON_CONFIG = "config.pbtxt"
_MAX_BYTES = 1 << 18  # ours have 2 kB; protobuf reads 100 kB of text a second
_MAX_DEPTH = 32  # levels; a configuration has 6
_STEP = {**dict.fromkeys(b"{<[", 1), **dict.fromkeys(b"}>]", -1)}


def read_triton_config(path: Path) -> ModelConfig:
    """Read a configuration.

    Raises:
        ModelError: when Triton could not read it either.
        EnvironmentProblem: without `tritonclient`, which brings the protobuf.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ImportError as error:
        raise EnvironmentProblem(
            f"{error.name} is missing, which Triton's {TRITON_CONFIG} is read with: pip install 'oarlock[serve]'"
        ) from error
    content = read_bytes(path, limit=_MAX_BYTES, what="Triton model configuration")
    if max(accumulate(_STEP.get(byte, 0) for byte in content), default=0) > _MAX_DEPTH:
        raise ModelError(f"{path}: more than {_MAX_DEPTH} levels deep, which no Triton model configuration is")
    try:
        return text_format.Parse(content.decode("utf-8"), ModelConfig())
    except (ValueError, text_format.ParseError, RecursionError) as error:
        raise ModelError(f"{path}: not a Triton model configuration: {first_line(error)}") from error


def make_template_config(model: str) -> ModelConfig:
    """Make the configuration of one of our models ("oarlock", "oarlock_infer", "oarlock_json"), with its inputs.

    Raises:
        EnvironmentProblem: without `tritonclient`, which brings the protobuf.
    """
    config = read_triton_config(TEMPLATES / model / TRITON_CONFIG)
    if model == "oarlock_json":  # its one input is in the file
        return config
    from tritonclient.grpc.model_config_pb2 import DataType

    for name, tensor in INPUTS.items():
        if name != "stream" or model == "oarlock":
            dims = [-1 if tensor.is_list else 1]
            config.input.add(name=name, data_type=DataType.Value(f"TYPE_{tensor.datatype}"), dims=dims, optional=True)
    return config
