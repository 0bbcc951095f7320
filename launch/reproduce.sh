#!/usr/bin/env bash
# Re-makes rows of the README's table: trains what is missing, goes on where it was stopped, then prints the table.
#   launch/reproduce.sh model_v1_onecycle mnistnet      SEEDS="0 1 2" launch/reproduce.sh simple_cnn epochs=2
set -euo pipefail

recipes=() overrides=()
for word in "$@"; do
    case "$word" in *=*) overrides+=("$word") ;; *) recipes+=("$word") ;; esac
done

runs=()
for seed in ${SEEDS:-0 1 2 3 4}; do
    for recipe in "${recipes[@]}"; do
        run="runs/reproduce/$recipe-seed$seed${overrides[*]:+-${overrides[*]// /-}}"
        runs+=("$run")
        [ "$(cat "$run/STATUS" 2>/dev/null)" = "done" ] && continue
        python -m mnist_dist.train --recipe "$recipe" --run-dir "$run" --world-size 1 seed="$seed" "${overrides[@]}"
    done
done
python -m mnist_dist.compare "${runs[@]}"
