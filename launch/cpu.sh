#!/usr/bin/env bash
# Trains in N processes on this machine's CPU; each takes its share of the cores, or as many threads as are named.
#   launch/cpu.sh --recipe lenet5 epochs=1          # as many processes as cores, up to 8: small networks gain most so
#   launch/cpu.sh 2 --recipe lenet5                 # N
#   launch/cpu.sh 2 4 --recipe lenet5               # N and THREADS
set -euo pipefail

: "${1:?what shall be trained? launch/cpu.sh [N [THREADS]] --recipe NAME}"
if [[ ${1-} =~ ^[0-9]+$ ]]; then
    n=$1
    shift
else
    cores=$(nproc)
    n=$((cores < 8 ? cores : 8))
fi
if [[ ${1-} =~ ^[0-9]+$ ]]; then
    export OMP_NUM_THREADS=$1
    shift
fi

export ACCELERATE_USE_CPU=true # the configuration file alone does not reach the processes of --multi_gpu
if [ "$n" = 1 ]; then
    exec python -m mnist_dist.train --world-size 1 "$@"
fi
# torchrun passes no SIGUSR1 on unless told, and dies of it.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
exec accelerate launch --quiet --config_file "$(dirname "$0")/accelerate/cpu.yaml" --num_processes "$n" \
    -m mnist_dist.train --world-size "$n" "$@"
