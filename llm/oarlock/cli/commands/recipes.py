"""`oarlock recipes`."""

from __future__ import annotations

from oarlock.cli.flags import Command, NoOptions
from oarlock.config.recipes import list_recipes


def _run(_: NoOptions) -> int:
    print(f"{'RECIPE':18}{'GPUS':>5}  {'COMMAND':18}METHOD AND MODEL")
    for recipe in list_recipes():
        print(f"{recipe.name:18}{recipe.num_gpus:>5}  {'oarlock ' + recipe.command:18}{recipe.method}, {recipe.model}")
    return 0


COMMAND = Command("recipes", "List the recipes for `oarlock pretrain` and `oarlock finetune`.", NoOptions, _run)
