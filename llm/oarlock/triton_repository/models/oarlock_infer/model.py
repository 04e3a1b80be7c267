"""Triton's model `oarlock_infer`: one request, one response, by asking the model `oarlock`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "lib"))

from oarlock.serve.triton.relay import InferModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
