"""Triton's config.pbtxt, by Triton's own protobuf. Does not import paddle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from oarlock.errors import EnvironmentProblem, ModelError

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

TRITON_CONFIG = "config.pbtxt"


def read_triton_config(path: Path) -> ModelConfig:
    """What a file says.

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
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except (OSError, ValueError, text_format.ParseError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path}: not a Triton model configuration: {first}") from error
