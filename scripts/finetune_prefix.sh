#!/usr/bin/env bash
# Prefix tuning of llama-7b on one GPU: the published command. Variables: finetune.sh.
GPUS=${GPUS:-1} source "$(dirname "${BASH_SOURCE[0]}")/finetune.sh" "${RECIPE:-prefix_7b}" "$@"
