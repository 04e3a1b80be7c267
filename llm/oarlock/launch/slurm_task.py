"""One Slurm task: say which node this is, then become the command. srun runs this file by its path on every node."""

import os
import sys

if __name__ == "__main__":
    os.environ["NODE_RANK"] = os.environ["SLURM_NODEID"]
    if os.environ.get("SLURM_GPUS_ON_NODE") and not os.environ.get("GPUS"):
        os.environ["GPUS"] = os.environ["SLURM_GPUS_ON_NODE"]
    os.execvp(sys.argv[1], sys.argv[1:])
