#!/usr/bin/env bash
# Trains on MIN to MAX machines. Machines may join and leave while the run trains: the others continue from the last
# checkpoint. Run the same command on each machine, with a run folder on a shared file system.
#   launch/elastic.sh HEAD:29400 1:4 --recipe resnet18 --run-dir /shared/runs/mine      # one process per GPU
#   launch/elastic.sh HEAD:29400 1:4 2 --recipe lenet5 --run-dir /shared/runs/mine      # two processes per machine
# HEAD is one of the machines, with the name that `hostname` prints there. It must stay: it holds the rendezvous.
set -euo pipefail

usage() {
    echo "usage: launch/elastic.sh HEAD:PORT MIN:MAX [PROCESSES_PER_MACHINE] --recipe NAME (1 ≤ MIN ≤ MAX)" >&2
    exit 2
}
[[ $# -gt 2 && $1 =~ :[0-9]+$ && $2 =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || usage
head=$1 machines=$2
[ "${machines%:*}" -le "${machines##*:}" ] || usage
shift 2
if [[ $1 =~ ^[0-9]+$ ]]; then
    each=$1
    shift
else
    each=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
[ "$each" -gt 0 ] || usage
least=$((${machines%:*} * each)) most=$((${machines##*:} * each))

export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 # by default SIGUSR1 would kill torchrun
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # with a shared store, torch 2.14 cannot let a machine join
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100} # seconds to save a checkpoint
# A machine that is silent for 10 s is lost. The others start 3 s after the first one is ready, or when all are there.
# The watchdog limit makes a silent machine cost less than a minute; a later engine.hang_seconds=… replaces it.
exec python "$(dirname "$0")/accelerate/launch.py" torchrun --nnodes "$machines" --nproc_per_node "$each" \
    --max-restarts 10 --rdzv_backend c10d --rdzv_endpoint "$head" --rdzv_id "$head" \
    --rdzv_conf last_call_timeout=3,keep_alive_interval=2,keep_alive_max_attempt=5 \
    -m mnist_dist.train --world-size "$least:$most" engine.hang_seconds=20 "$@"
