#!/usr/bin/env bash
# Continue pretraining llama-7b on 8 GPUs with sharding stage 2: the published command. Variables: pretrain.sh.
GPUS=${GPUS:-0,1,2,3,4,5,6,7} OUTPUT=${OUTPUT:-output/llama_hybid} TP='' PP='' \
  source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh" pretrain_7b "$@"
