#!/usr/bin/env bash
# Instruction tuning of llama-7b on 4 GPUs: the published command. Variables: finetune.sh.
GPUS=${GPUS:-0,1,2,3} source "$(dirname "${BASH_SOURCE[0]}")/finetune.sh" "${RECIPE:-instruction_7b}" "$@"
