#!/usr/bin/env bash
# Instruction tuning of llama-7b on 4 GPUs: the published command.
#
#   bash scripts/finetune_instruction.sh [FLAGS]     FLAGS of llm/finetune_generation.py, which go over the recipe
#
#   DRY_RUN=1 bash scripts/finetune_instruction.sh                                         print the command
#   DATA=my_dataset bash scripts/finetune_instruction.sh --num_train_epochs 3              your data
#   DEVICE=cpu MODEL=output/quickstart/pretrained bash scripts/finetune_instruction.sh FLAGS
#       rehearse the same ranks on the CPU; FLAGS as REHEARSAL below has them
set -euo pipefail

RECIPE=${RECIPE:-instruction_7b} # of configs/recipes: all values stand there
GPUS=${GPUS:-0,1,2,3}            # a list of at least two (0,1,2,3), or how many
MODEL=${MODEL:-}                 # a built-in name or a folder; empty: the recipe's
DATA=${DATA:-}                   # file, folder or hub name; empty: the embedded instructions
OUTPUT=${OUTPUT:-./checkpoints/} # an old run there is deleted, as published (unless OVERWRITE=0)
REHEARSAL="--max_steps 5 --warmup_steps 1 --gradient_accumulation_steps 1" # flags that make it short enough for a CPU
# Also DEVICE, PYTHON, LOG_DIR, NNODES, MASTER, NODE_RANK and MAX_RESTART, see launch_common.sh.

# shellcheck source=scripts/launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"
finetune "$@"
