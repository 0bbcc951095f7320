#!/usr/bin/env bash
# Trains on all GPUs of this machine, or those in CUDA_VISIBLE_DEVICES; without a GPU in one process on the CPU.
#   launch/local.sh --recipe resnet18 epochs=1
set -euo pipefail

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -le 1 ]; then
    # No launcher: signals reach the trainer directly, and the exit code is the trainer's.
    exec python -m mnist_dist.train --world-size 1 "$@"
fi
# By default torchrun does not forward SIGUSR1; the signal would kill it.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
exec python "$(dirname "$0")/accelerate/launch.py" --quiet \
    --config_file "$(dirname "$0")/accelerate/multi_gpu.yaml" --num_processes "$gpus" \
    -m mnist_dist.train --world-size "$gpus" "$@"
