#!/usr/bin/env bash
# Trains on several machines; every one of them runs the same line, with a run folder that all of them see.
#   launch/multi_node.sh HEAD:29500 2 8 --recipe resnet18 --run-dir /shared/runs/mine     # 2 machines, 8 processes each
# HEAD is any one of the machines, by the name that `hostname` prints there; the port must be free on it.
set -euo pipefail

usage="launch/multi_node.sh HEAD:PORT MACHINES PROCESSES_PER_MACHINE --recipe NAME"
head=${1:?$usage} machines=${2:?$usage} each=${3:?$usage}
shift 3

# One machine meets itself at the same place: torchrun's default port would be another job's too.
export PET_RDZV_ENDPOINT=$head
# torchrun passes no SIGUSR1 on unless told, and dies of it.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
exec accelerate launch --quiet --config_file "$(dirname "$0")/accelerate/multi_node.yaml" \
    --num_machines "$machines" --num_processes "$((machines * each))" \
    --main_process_ip "${head%:*}" --main_process_port "${head##*:}" --rdzv_backend c10d \
    -m mnist_dist.train --world-size "$((machines * each))" "$@"
