#!/usr/bin/env bash
# QLoRA of llama-7b on one GPU: LoRA on weights of 4 bits. Variables: finetune.sh.
GPUS=${GPUS:-1} source "$(dirname "${BASH_SOURCE[0]}")/finetune.sh" "${RECIPE:-qlora_7b}" "$@"
