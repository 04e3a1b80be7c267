"""Parse a launch command of PaddleNLP's and Oarlock's scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oarlock.config.finetune import FinetuneConfig
from oarlock.config.load import load_config
from oarlock.config.pretrain import PretrainConfig
from oarlock.config.run_config import RunConfig
from oarlock.errors import ConfigError

_ENTRYPOINTS: dict[str, type[Any]] = {"run_pretrain.py": PretrainConfig, "finetune_generation.py": FinetuneConfig}
_RANK_FLAGS = ("--gpus", "--devices", "--xpus", "--npus")


@dataclass(frozen=True)
class Command:
    """A configuration and the number of ranks that a command launches."""

    config: RunConfig
    num_ranks: int


def parse_command(words: Sequence[str], num_ranks: int | None) -> Command:
    """Parse `[python -m paddle.distributed.launch ...] run_pretrain.py FLAGS`, or a YAML file and flags.

    Args:
        num_ranks: the value of --ranks. Default: from the launcher's --gpus, --devices or --nproc_per_node.

    Raises:
        ConfigError: the command names no entrypoint, or no number of ranks.
    """
    words = [word for word in words if word.strip()]  # line continuations leave blanks
    place = next((i for i, word in enumerate(words) if Path(word).name in _ENTRYPOINTS), None)
    if place is not None:
        config_class = _ENTRYPOINTS[Path(words[place]).name]
        num_ranks = num_ranks or _launched_ranks(words[:place])
        flags = list(words[place + 1 :])
    elif words and words[0].endswith((".yaml", ".yml")):
        flags = list(words)
        config_class = _class_for(flags)
    else:
        raise ConfigError(
            "expected a launch command with run_pretrain.py or finetune_generation.py, or a .yaml configuration"
        )
    if not num_ranks:
        raise ConfigError("unknown number of ranks: add --ranks N before the command, or --gpus 0,1,... to it")
    return Command(load_config(config_class, flags).config, num_ranks)


def _launched_ranks(words: Sequence[str]) -> int | None:
    """The number of ranks in the launcher's own flags."""
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
        raise ConfigError(f"{flag} must be a number; got {text[:100]!r}")
    return int(text)


def _class_for(flags: Sequence[str]) -> type[Any]:
    """The configuration class that knows all options of a YAML file."""
    try:
        load_config(PretrainConfig, flags)
    except ConfigError as error:
        try:
            load_config(FinetuneConfig, flags)
        except ConfigError:
            raise error from None
        return FinetuneConfig
    return PretrainConfig
