#!/usr/bin/env bash
# Run a directory of `oarlock export --target fastdeploy` in FastDeploy's own image (NVIDIA GPU):
#   IMAGE=the/fastdeploy:image MODEL=output/fastdeploy bash deploy/fastdeploy/run.sh
# IMAGE: as FastDeploy's installation page names it for your CUDA. Words after the script's name go to the server.
set -euo pipefail
IMAGE=${IMAGE:?the image of FastDeploy 2.x}
MODEL=$(CDPATH='' cd -- "${MODEL:?the exported directory}" && pwd)
PORT=${PORT:-8180}
GPUS=${GPUS:-all}
DOCKER=${DOCKER:-docker}

[[ $PORT =~ ^[0-9]{1,5}$ ]] || { echo "PORT must be a number; got \"$PORT\"" >&2; exit 2; }
case $MODEL in *:*) echo "$MODEL: docker takes no folder with a colon in its name" >&2; exit 2 ;; esac
[ -f "$MODEL/start.sh" ] || { echo "$MODEL has no start.sh: export it with --target fastdeploy" >&2; exit 2; }
exec "$DOCKER" run --rm --gpus "$GPUS" --shm-size 8g --publish "127.0.0.1:$PORT:$PORT" \
  --volume "$MODEL:/model:ro" --env HOST=0.0.0.0 --env PORT="$PORT" "$IMAGE" bash /model/start.sh "$@"
