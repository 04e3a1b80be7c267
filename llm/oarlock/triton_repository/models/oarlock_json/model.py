"""Triton's model `oarlock_json`: FastDeploy's JSON form, by asking the model `oarlock`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "lib"))

from oarlock.serve.triton.relay import JsonModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
