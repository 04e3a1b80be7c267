"""`oarlock recipes`."""

from __future__ import annotations

from oarlock.cli.flags import Command, NoOptions
from oarlock.config import FinetuneConfig, PretrainConfig, load_config
from oarlock.config.recipes import list_recipes


def _run(_: NoOptions) -> int:
    rows = [("RECIPE", "GPUS", "MODEL", "METHOD", "COMMAND")]
    for recipe in list_recipes():
        kind = PretrainConfig if recipe.command == "pretrain" else FinetuneConfig
        model = load_config(kind, [recipe.name]).config.model.model_name_or_path
        rows.append((recipe.name, str(recipe.num_gpus), model, recipe.method, f"oarlock {recipe.command}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    return 0


COMMAND = Command("recipes", "List the recipes for `oarlock pretrain` and `oarlock finetune`.", NoOptions, _run)
