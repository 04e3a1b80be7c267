"""Files that an installed package has inside and a checkout has beside it: the recipes, and the training scripts."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
ENTRYPOINTS = {"pretrain": "run_pretrain.py", "finetune": "finetune_generation.py"}


def configs_folder() -> Path:
    """The folder of the recipes and of the parts that they are made of."""
    packaged = _PACKAGE / "configs"
    return packaged if packaged.is_dir() else _PACKAGE.parents[1] / "configs"


def entrypoint_script(command: str) -> Path:
    """The script that launchers start for `oarlock pretrain` or `oarlock finetune`."""
    packaged = _PACKAGE / "entrypoints"
    return (packaged if packaged.is_dir() else _PACKAGE.parent) / ENTRYPOINTS[command]
