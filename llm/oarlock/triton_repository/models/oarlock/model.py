"""Triton's model `oarlock`: the engine, answering as it goes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "lib"))

from oarlock.serve.triton.backend import StreamingModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
