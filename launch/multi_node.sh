#!/usr/bin/env bash
# Trains on several machines. Run the same command on each machine, with a run folder on a shared file system.
#   launch/multi_node.sh HEAD:29500 2 8 --recipe resnet18 --run-dir /shared/runs/mine     # 2 machines, 8 processes each
# HEAD is one of the machines, with the name that `hostname` prints there. The port must be free on it.
set -euo pipefail

usage() {
    echo "usage: launch/multi_node.sh HEAD:PORT MACHINES PROCESSES_PER_MACHINE --recipe NAME (numbers are at least 1)" >&2
    exit 2
}
[[ $# -gt 3 && $1 =~ :[0-9]+$ && $2 =~ ^[1-9][0-9]*$ && $3 =~ ^[1-9][0-9]*$ ]] || usage
head=$1 machines=$2 each=$3
shift 3

if [ "$((machines * each))" = 1 ]; then
    # No launcher: signals reach the trainer directly, and the exit code is the trainer's.
    exec python -m mnist_dist.train --world-size 1 "$@"
fi
# For one machine accelerate omits the endpoint, and torchrun's default port may be used by another job.
export PET_RDZV_ENDPOINT=$head
# By default torchrun does not forward SIGUSR1; the signal would kill it.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
exec python "$(dirname "$0")/accelerate/launch.py" --quiet --config_file "$(dirname "$0")/accelerate/multi_node.yaml" \
    --num_machines "$machines" --num_processes "$((machines * each))" \
    --main_process_ip "${head%:*}" --main_process_port "${head##*:}" --rdzv_backend c10d \
    -m mnist_dist.train --world-size "$((machines * each))" "$@"
