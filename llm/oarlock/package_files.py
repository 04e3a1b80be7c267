"""Find the recipes and training scripts: inside an installed package, or next to the package in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
ENTRYPOINTS = {"pretrain": "run_pretrain.py", "finetune": "finetune_generation.py"}


def find_configs() -> Path:
    """Return the folder of the recipes and their parts."""
    packaged = _PACKAGE / "configs"
    return packaged if packaged.is_dir() else _PACKAGE.parents[1] / "configs"


def find_entrypoint(command: str) -> Path:
    """Return the script that a launcher starts for "pretrain" or "finetune"."""
    packaged = _PACKAGE / "entrypoints"
    return (packaged if packaged.is_dir() else _PACKAGE.parent) / ENTRYPOINTS[command]
