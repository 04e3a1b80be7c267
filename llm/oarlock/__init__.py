"""Oarlock: training, parallelism, export and serving of large language models on PaddlePaddle.

Importing this package is cheap: nothing here imports paddle, so that `oarlock --help`, `--print_config` and every
check of a configuration answer at once.
"""

__version__ = "0.1.0"
