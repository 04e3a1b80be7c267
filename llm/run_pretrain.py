"""Pretrain a language model, from scratch or from released weights: `python run_pretrain.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # oarlock is in this folder; no install is needed

from oarlock.cli.commands.train import pretrain
from oarlock.errors import exit_with

if __name__ == "__main__":
    exit_with(lambda: pretrain(sys.argv[1:], "run_pretrain.py"))
