"""Fine-tune a language model on questions and answers: `python finetune_generation.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # oarlock is in this folder; no install is needed

from oarlock.cli.commands.train import finetune
from oarlock.errors import exit_with

if __name__ == "__main__":
    exit_with(lambda: finetune(sys.argv[1:], "finetune_generation.py"))
