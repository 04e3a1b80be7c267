"""`oarlock pretrain` and `oarlock finetune`."""

from __future__ import annotations

from collections.abc import Sequence

from oarlock.api.training import run_training
from oarlock.cli.flags import ConfigCommand
from oarlock.config import FinetuneConfig, PretrainConfig
from oarlock.config.command_line import read_command_line


def pretrain(words: Sequence[str], program: str = "oarlock pretrain") -> int:
    """Read and check the command line, then pretrain; returns the exit code."""
    loaded = read_command_line(PretrainConfig, words, program)
    return 0 if loaded is None else run_training(loaded)  # None: --help or --print_config was answered


def finetune(words: Sequence[str], program: str = "oarlock finetune") -> int:
    """Read and check the command line, then fine-tune; returns the exit code."""
    loaded = read_command_line(FinetuneConfig, words, program)
    return 0 if loaded is None else run_training(loaded)


PRETRAIN = ConfigCommand("pretrain", "Pretrain a model, from scratch or from released weights.", pretrain)
FINETUNE = ConfigCommand("finetune", "Fine-tune a model on questions and answers.", finetune)
