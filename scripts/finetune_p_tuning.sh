#!/usr/bin/env bash
# P-tuning of llama-7b on one GPU: trains virtual tokens that precede the text. Variables: finetune.sh.
GPUS=${GPUS:-1} source "$(dirname "${BASH_SOURCE[0]}")/finetune.sh" "${RECIPE:-p_tuning_7b}" "$@"
