#!/usr/bin/env bash
# All that is to be known of how fast and how right one GPU trains, in under nine minutes, into a folder.
# Needs pip install -e ".[test,export]": its first part is the tests of the captured step.
#   launch/gpu_report.sh                         RECIPES="simple_cnn ms_ran" launch/gpu_report.sh bf16 mixed_precision=bf16
#   launch/gpu_report.sh --rehearse rehearsal    # every part once on the CPU, too small for any figure to mean anything
#   PATIENCE=20 launch/gpu_report.sh cpu         # a CPU in earnest: twenty times as long for each part
set -uo pipefail

rehearse=
if [ "${1-}" = --rehearse ]; then
    rehearse=yes
    shift
fi
out=gpu_report
if [[ ${1-} != '' && $1 != *=* ]]; then
    out=$1
    shift
fi
usage="launch/gpu_report.sh [--rehearse] [FOLDER] [key=value …]"
if [[ $out == -* ]]; then
    echo "$usage" >&2
    exit 2
fi
if ! mkdir -p "$out" || [ "$(ls -A "$out")" ]; then
    echo "$usage: $out is not empty, or cannot be made; name a new folder" >&2
    exit 2
fi
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 1

# The large ones last: when time runs out, it is theirs.
recipes=${RECIPES:-model_v1_onecycle model_v2_onecycle model_v3_onecycle simple_cnn mnistnet ms_ran \
    resnet18 resnet34 resnet50 resnet101 resnet152}
seeds=30 rounds=5 steps=20 batches=1,32,256,1024 overrides=("$@")
if [ "$rehearse" ]; then
    export ACCELERATE_USE_CPU=true
    recipes=${RECIPES:-model_v1_onecycle ms_ran}
    seeds=1 rounds=2 steps=1 batches=1,4
    overrides=(data.dataset=synthetic data.limit_train=64 data.limit_test=16 batch_size=8 epochs=1 "$@")
fi

patience=${PATIENCE:-1} # times as long as a GPU gets
limit=$((530 * patience)) # seconds for everything
failed=0
trap 'kill "$!" 2>/dev/null; exit 130' INT TERM
# part NAME SECONDS COMMAND…: runs it under its own limit and what is left of the whole one; what fails stops nothing.
part() {
    local name=$1 seconds=$(($2 * patience)) began=$SECONDS verdict=ok
    shift 2
    seconds=$((seconds < limit - SECONDS ? seconds : limit - SECONDS))
    if [ "$seconds" -lt 1 ]; then
        verdict="FAILED: no time was left"
    else
        timeout --kill-after=5 "$seconds" "$@" >"$out/$name.log" 2>&1 &
        wait "$!" # not in the foreground: a signal would not be heard until the part is done
        case $? in
        0) ;;
        124 | 137) verdict="FAILED: not done after $seconds s, see $name.log" ;;
        *) verdict="FAILED: see $name.log" ;;
        esac
    fi
    [ "$verdict" = ok ] || failed=$((failed + 1))
    printf '%-32s %4d s  %s\n' "$name" $((SECONDS - began)) "$verdict" | tee -a "$out/summary.txt"
}

part machine 30 bash -c 'nvidia-smi || lscpu
    python -c "from mnist_dist.run.provenance import git_commit, versions; print(git_commit(), versions())"'
part correctness 90 python -m pytest tests/engine/test_cuda_graph.py tests/engine/test_train_step.py -n 0 -q
for recipe in ms_ran model_v1_onecycle; do
    part "inference_$recipe" 45 python -m mnist_dist.benchmark --recipe "$recipe" --inference --batches "$batches" \
        --rounds "$rounds" --json "$out/inference_$recipe.json" --markdown "$out/report.md" "${overrides[@]}"
done
for record in mnist_99 mnist_99_4 mnist_99_5; do
    part "record_$record" 75 python -m mnist_dist.benchmark --time-to-accuracy "configs/speed/$record.yaml" --seeds "$seeds" \
        --json "$out/record_$record.json" "${overrides[@]}"
done
part record_mnist_99_ten_a_replay 75 python -m mnist_dist.benchmark --time-to-accuracy configs/speed/mnist_99.yaml \
    --seeds "$seeds" --json "$out/record_mnist_99_ten_a_replay.json" "${overrides[@]}" engine.capture=epoch
for recipe in $recipes; do
    part "speed_$recipe" 45 python -m mnist_dist.benchmark --recipe "$recipe" --rounds "$rounds" --steps "$steps" \
        --json "$out/speed_$recipe.json" --markdown "$out/report.md" "${overrides[@]}"
done
part doctor 30 python -m mnist_dist.doctor --run-dir "$out" --json "$out/doctor.json"
figures=()
for file in "$out"/speed_*.json "$out"/inference_*.json; do
    [ -f "$file" ] && figures+=("$file")
done
part floors 20 python -m mnist_dist.benchmark --floors "${figures[@]}"
[ -f "$out/floors.log" ] && cat "$out/floors.log"

echo "$failed part(s) failed; everything is in $out ($SECONDS s)" | tee -a "$out/summary.txt"
[ "$failed" = 0 ]
