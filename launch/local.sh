#!/usr/bin/env bash
# Trains on all GPUs of this machine (or those that CUDA_VISIBLE_DEVICES leaves), or in one process where there is none.
#   launch/local.sh --recipe resnet18 epochs=1
set -euo pipefail

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -le 1 ]; then
    # Without a launcher in between, signals and the exit code are the trainer's own.
    exec python -m mnist_dist.train --world-size 1 "$@"
fi
# torchrun passes no SIGUSR1 on unless told, and dies of it.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
exec accelerate launch --quiet --config_file "$(dirname "$0")/accelerate/multi_gpu.yaml" --num_processes "$gpus" \
    -m mnist_dist.train --world-size "$gpus" "$@"
