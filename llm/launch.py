"""Start the ranks of a training script: `python launch.py --help`. The same as `oarlock launch`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # oarlock lies beside this file; no install is needed

from oarlock.cli.main import main

if __name__ == "__main__":
    main(["launch", *sys.argv[1:]])
