"""Parse a launch command as it is in people's shell history."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oarlock.config.finetune import FinetuneConfig
from oarlock.config.load import load_config
from oarlock.config.pretrain import PretrainConfig
from oarlock.config.recipes import list_recipes
from oarlock.config.run_config import RunConfig
from oarlock.errors import ConfigError
from oarlock.package_files import ENTRYPOINTS

_KINDS: dict[str, type[Any]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
_CONFIGS = _KINDS | {script: _KINDS[name] for name, script in ENTRYPOINTS.items()}
_RANK_FLAGS = ("--gpus", "--devices", "--xpus", "--npus")


@dataclass(frozen=True)
class TrainingCommand:
    """The configuration and the number of ranks of a training command."""

    config: RunConfig
    num_ranks: int


def parse_command(words: Sequence[str], num_ranks: int | None) -> TrainingCommand:
    """Parse `[python -m paddle.distributed.launch ...] run_pretrain.py FLAGS`, or a recipe and flags.

    Args:
        words: the command. `oarlock pretrain` and `oarlock finetune` stand for the scripts.
        num_ranks: --ranks. Without it, the launcher's --gpus, --devices or --nproc_per_node are counted.

    Raises:
        ConfigError: the command names no entrypoint, or no number of ranks.
    """
    words = [word for word in words if word.strip()]  # line continuations leave blanks
    first = next((i for i, word in enumerate(words) if Path(word).name == "oarlock"), len(words))
    place = next(
        (
            i
            for i, word in enumerate(words)
            if Path(word).name in ENTRYPOINTS.values() or (i > first and word in _KINDS)
        ),
        None,
    )
    if place is not None:
        if "launch" in words[:place]:
            raise ConfigError("give the command that `oarlock launch --dry_run` prints, which has all degrees")
        config_class = _CONFIGS[Path(words[place]).name]
        num_ranks = num_ranks or _launched_ranks(words[:place])
        flags = list(words[place + 1 :])
    elif words and (words[0].endswith((".yaml", ".yml")) or words[0] in {recipe.name for recipe in list_recipes()}):
        flags = list(words)
        config_class = _class_for(flags)
    else:
        raise ConfigError("give a launch command with run_pretrain.py or finetune_generation.py in it, or a recipe")
    if not num_ranks:
        raise ConfigError("how many ranks? Add --ranks N before the command (or --gpus 0,1,... in it)")
    return TrainingCommand(load_config(config_class, flags).config, num_ranks)


def _launched_ranks(words: Sequence[str]) -> int | None:
    """Count the ranks that the launcher's own flags ask for."""
    values: dict[str, str] = {}
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in (*_RANK_FLAGS, "--nproc_per_node", "--nnodes"):
            values[name] = value if equals else words[i + 1] if i + 1 < len(words) else ""
    per_node = next((len(values[flag].strip("\"' ").split(",")) for flag in _RANK_FLAGS if flag in values), None)
    if "--nproc_per_node" in values:
        per_node = _count("--nproc_per_node", values["--nproc_per_node"])
    return per_node * _count("--nnodes", values.get("--nnodes", "1").partition(":")[0]) if per_node else None


def _count(flag: str, text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise ConfigError(f"{flag} must be a number; it is {text[:100]!r}")
    return int(text)


def _class_for(flags: Sequence[str]) -> type[Any]:
    """Return the class of configuration that knows all options of a recipe."""
    try:
        load_config(PretrainConfig, flags)
    except ConfigError as error:
        try:
            load_config(FinetuneConfig, flags)
        except ConfigError:
            raise error from None
        return FinetuneConfig
    return PretrainConfig
