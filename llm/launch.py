"""Start the ranks of a training script: `python launch.py --help`. The same as `oarlock launch`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # finds oarlock without an install

from oarlock.cli.main import main

if __name__ == "__main__":
    main(["launch", *sys.argv[1:]])
