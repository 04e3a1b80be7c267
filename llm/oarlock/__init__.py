"""Oarlock: training, parallelism, export and serving of large language models on PaddlePaddle.

    from oarlock import Engine, finetune, load_config

Importing this package is cheap: nothing here imports Paddle, so that `oarlock --help`, `--print_config` and every check
of a configuration answer at once.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# The Python interface: name -> module, which is imported when the name is first used.
_INTERFACE = {
    **dict.fromkeys(("TrainingResult", "finetune", "load_config", "pretrain"), "oarlock.api.training"),
    **dict.fromkeys(("ask", "check_export", "convert_model", "export_model", "merge_adapters"), "oarlock.api.models"),
    "new_model": "oarlock.api.new_model",
    "train_tokenizer": "oarlock.api.data",
    "Chat": "oarlock.serve.chat",
    "Engine": "oarlock.serve.engine.engine",
    "EngineConfig": "oarlock.serve.config",
    "Prompt": "oarlock.serve.request",
    "SamplingParams": "oarlock.sampling.params",
    **dict.fromkeys(("Recipe", "list_recipes"), "oarlock.config.recipes"),
    **dict.fromkeys(
        (
            *("CheckpointError", "ConfigError", "DataError", "EnvironmentProblem", "ModelError", "OarlockError"),
            "TrainingError",
        ),
        "oarlock.errors",
    ),
}
__all__ = sorted(_INTERFACE)


def __getattr__(name: str) -> Any:
    if name not in _INTERFACE:
        raise AttributeError(f"module 'oarlock' has no attribute {name!r}")
    return getattr(importlib.import_module(_INTERFACE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_INTERFACE})
