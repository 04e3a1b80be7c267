#!/usr/bin/env bash
# LoRA of llama-7b on one GPU: the published command. Variables: finetune.sh.
GPUS=${GPUS:-1} source "$(dirname "${BASH_SOURCE[0]}")/finetune.sh" "${RECIPE:-lora_7b}" "$@"
