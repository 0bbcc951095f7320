#!/usr/bin/env bash
# Reproduces rows of the results table: trains missing runs, teachers first, and resumes stopped ones. Then prints the
# table of these runs and writes the table of all runs in runs/reproduce into runs/reproduce/results.md.
#   launch/reproduce.sh                                       all recipes of the table, five seeds: days on a CPU
#   launch/reproduce.sh model_v1_onecycle mnistnet            these recipes
#   SEEDS="0 1 2" launch/reproduce.sh simple_cnn epochs=2     other seeds, with an override
set -euo pipefail

folder=runs/reproduce recipes=() overrides=()
for word in "$@"; do
    case "$word" in *=*) overrides+=("$word") ;; *) recipes+=("$word") ;; esac
done
if [ ${#recipes[@]} = 0 ]; then
    # A name with spaces is an ensemble: a row of the table, but not a recipe.
    while read -r recipe; do recipes+=("$recipe"); done < <(sed -n 's/^{"recipe": "\([^" ]*\)".*/\1/p' configs/results.jsonl | sort -u)
fi

reproduce() { # recipe seed overrides…
    local recipe=$1 seed=$2 run teacher
    shift 2
    run="$folder/$recipe-seed$seed${*:+-${*//[ \/]/-}}"
    runs+=("$run")
    [ "$(cat "$run/STATUS" 2>/dev/null)" = "done" ] && return
    while read -r teacher; do # a recipe refers to its teachers by the folders that this script creates
        (reproduce "${teacher%-seed*}" "${teacher##*-seed}")
    done < <(python -m mnist_dist.train --recipe "$recipe" --print-recipe "$@" | sed -n "s|^ *- $folder/||p")
    python -m mnist_dist.train --recipe "$recipe" --run-dir "$run" --world-size 1 seed="$seed" "$@" </dev/null
}

runs=()
for seed in ${SEEDS:-0 1 2 3 4}; do
    for recipe in "${recipes[@]}"; do
        reproduce "$recipe" "$seed" ${overrides[@]+"${overrides[@]}"} # macOS's bash 3.2 takes an empty array as unset
    done
done
python -m mnist_dist.compare "${runs[@]}" --no-html
python -m mnist_dist.compare "$folder" --no-html --markdown "$folder/results.md" >/dev/null
