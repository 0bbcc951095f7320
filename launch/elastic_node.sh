#!/usr/bin/env bash
# Runs launch/elastic.sh with the same arguments on one node of a job; launch/elastic.sbatch starts it on each node.
# The first node runs the batch script and holds the rendezvous. If it dies, SLURM only removes it from a job with
# --no-kill, so another node requeues the job.
set -euo pipefail

head=${1:?usage: see launch/elastic.sh}
head=${head%:*}
trap exit USR1 TERM # after the launcher has ended: the batch script requeues a job that was stopped on request
"$(dirname "$0")/elastic.sh" "$@" && exit || code=$?
[ "$code" = 75 ] || exit "$code"

# The rendezvous is lost: the first node has died, or only its launcher has ended and the batch script decides. SLURM
# knows which after SlurmdTimeout, five minutes by default.
echo "$(hostname) waits until SLURM has removed $head from the job, and then requeues the job" >&2
for _ in {1..120}; do
    sleep 5
    if job=$(squeue --noheader --jobs="$SLURM_JOB_ID" --nodelist="$head" --format=%i) && [ -z "$job" ]; then
        exec scontrol requeue "$SLURM_JOB_ID"
    fi
done
exit "$code"
