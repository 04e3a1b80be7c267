"""Fine-tune a language model on questions and answers: `python finetune_generation.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # oarlock lies beside this file; no install is needed

from oarlock.config import FinetuneConfig
from oarlock.config.command_line import read_command_line
from oarlock.errors import exit_with


def main() -> int:
    """Read and check the command line, then fine-tune."""
    loaded = read_command_line(FinetuneConfig, sys.argv[1:], "finetune_generation.py")
    if loaded is None:  # --help or --print_config was answered
        return 0
    from oarlock.train.output.lock import output_held

    with output_held(loaded.config.checkpoint.output_dir):  # before the seconds that importing Paddle takes
        from oarlock.environment.paddle_import import import_paddle

        import_paddle(loaded.config.runtime.num_threads)
        from oarlock.train.finetune import finetune

        return finetune(loaded)


if __name__ == "__main__":
    exit_with(main)
