"""Pretrain a language model, from scratch or from released weights: `python run_pretrain.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # oarlock lies beside this file; no install is needed

from oarlock.config import PretrainConfig
from oarlock.config.command_line import read_command_line
from oarlock.errors import exit_with


def main() -> int:
    """Read and check the command line, then pretrain."""
    loaded = read_command_line(PretrainConfig, sys.argv[1:], "run_pretrain.py")
    if loaded is None:  # --help or --print_config was answered
        return 0
    from oarlock.train.output.lock import output_held

    with output_held(loaded.config.checkpoint.output_dir):  # before the seconds that importing Paddle takes
        from oarlock.environment.paddle_import import import_paddle

        import_paddle(loaded.config.runtime.num_threads)
        from oarlock.train.pretrain import pretrain

        return pretrain(loaded)


if __name__ == "__main__":
    exit_with(main)
