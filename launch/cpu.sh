#!/usr/bin/env bash
# Trains in N processes on the CPU of this machine. Each process uses THREADS threads, by default its share of the cores.
#   launch/cpu.sh --recipe lenet5 epochs=1          # one process per core, at most 8: the fastest for small networks
#   launch/cpu.sh 2 --recipe lenet5                 # two processes
#   launch/cpu.sh 2 4 --recipe lenet5               # two processes of four threads
set -euo pipefail

usage() {
    echo "usage: launch/cpu.sh [N [THREADS]] --recipe NAME (N and THREADS are at least 1)" >&2
    exit 2
}
[ $# -gt 0 ] || usage
if [[ ${1-} =~ ^[0-9]+$ ]]; then
    n=$1
    shift
else
    cores=$(python -c 'from mnist_dist.machine.limits import count_cores; print(count_cores())')
    n=$((cores < 8 ? cores : 8))
fi
if [[ ${1-} =~ ^[0-9]+$ ]]; then
    export OMP_NUM_THREADS=$1
    shift
    [ "$OMP_NUM_THREADS" -gt 0 ] || usage
fi
[ "$n" -gt 0 ] || usage

export ACCELERATE_USE_CPU=true # with --multi_gpu, accelerate ignores use_cpu of the configuration file
if [ "$n" = 1 ]; then
    exec python -m mnist_dist.train --world-size 1 "$@"
fi
# By default torchrun does not forward SIGUSR1; the signal would kill it.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
exec python "$(dirname "$0")/accelerate/launch.py" --quiet \
    --config_file "$(dirname "$0")/accelerate/cpu.yaml" --num_processes "$n" \
    -m mnist_dist.train --world-size "$n" "$@"
