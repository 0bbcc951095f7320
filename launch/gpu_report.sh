#!/usr/bin/env bash
# Measures correctness and speed of training on one GPU in under nine minutes and writes the results into a folder.
# Where it finds several GPUs, it also tests and measures training on all of them.
# Needs pip install -e ".[test,export]": the second part runs the tests of the captured step.
#   launch/gpu_report.sh                         # into the folder gpu_report
#   RECIPES="simple_cnn resnet152" launch/gpu_report.sh bf16 mixed_precision=bf16    # other networks
#   launch/gpu_report.sh --rehearse rehearsal    # runs every part on the CPU, too small for meaningful figures
#   PATIENCE=20 launch/gpu_report.sh cpu         # measures a CPU: every time limit is multiplied by 20
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
    echo "$usage: $out is not empty or cannot be created; name a new folder" >&2
    exit 2
fi
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 1

# On an H100 with 10 cores, the speed of model_v1_onecycle took 50 s: the imports, the trial of DataLoader workers, and the
# choice of kernels. Large networks come last, because the parts at the end are skipped if the time limit is reached.
recipes=${RECIPES:-model_v1_onecycle ms_ran resnet18 resnet50}
seeds=30 rounds=5 steps=20 batches=1,32,256,1024 overrides=("$@")
if [ "$rehearse" ]; then
    export ACCELERATE_USE_CPU=true
    recipes=${RECIPES:-model_v1_onecycle ms_ran}
    seeds=1 rounds=2 steps=1 batches=1,4
    overrides=(data.dataset=synthetic data.limit_train=64 data.limit_test=16 batch_size=8 epochs=1 "$@")
fi

patience=${PATIENCE:-1} # multiplies every time limit
limit=$((530 * patience)) # seconds for all parts
failed=0
trap 'kill "$!" 2>/dev/null; exit 130' INT TERM
# part NAME SECONDS COMMAND…: runs the command with its own time limit, or the rest of the total limit if that is
# shorter. The report continues after a part that fails.
part() {
    local name=$1 seconds=$(($2 * patience)) started=$SECONDS verdict=ok
    shift 2
    seconds=$((seconds < limit - SECONDS ? seconds : limit - SECONDS))
    if [ "$seconds" -lt 1 ]; then
        verdict="FAILED: no time left"
    else
        timeout --kill-after=5 "$seconds" "$@" >"$out/$name.log" 2>&1 &
        wait "$!" # in the background, because bash handles a signal only after a foreground command has ended
        case $? in
        0) ;;
        124 | 137) verdict="FAILED: not finished after $seconds s, see $name.log" ;;
        *) verdict="FAILED: see $name.log" ;;
        esac
    fi
    [ "$verdict" = ok ] || failed=$((failed + 1))
    printf '%-36s %4d s  %s\n' "$name" $((SECONDS - started)) "$verdict" | tee -a "$out/summary.txt"
}

part machine 30 bash -c 'nvidia-smi || lscpu
    python -c "from mnist_dist.run.provenance import git_commit, versions; print(git_commit(), versions())"'
part correctness 90 python -m pytest tests/engine/test_cuda_graph.py tests/engine/test_train_step.py \
    tests/benchmark/test_baselines.py -n 0 -q
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
[ "$rehearse" ] && gpus=2 # processes on the CPU
if [ "$gpus" -gt 1 ]; then
    part correctness_of_several_gpus 90 python -m pytest tests/distributed/test_gradients.py -n 0 -q -rs
    for recipe in model_v1_onecycle ms_ran resnet50; do
        [ "$rehearse" ] && [ "$recipe" = resnet50 ] && continue
        part "several_gpus_$recipe" 45 python -m torch.distributed.run --standalone --nproc_per_node "$gpus" \
            -m mnist_dist.benchmark --recipe "$recipe" --rounds "$rounds" --steps "$steps" \
            --json "$out/several_gpus_$recipe.json" --markdown "$out/report.md" "${overrides[@]}"
    done
fi
for recipe in ms_ran model_v1_onecycle; do
    part "inference_$recipe" 45 python -m mnist_dist.benchmark --recipe "$recipe" --inference --batches "$batches" \
        --rounds "$rounds" --json "$out/inference_$recipe.json" --markdown "$out/report.md" "${overrides[@]}"
done
# time_to_accuracy NAME RECIPE [key=value …]
time_to_accuracy() {
    local name=time_to_accuracy_$1 recipe=configs/speed/$2.yaml
    shift 2
    part "$name" 75 python -m mnist_dist.benchmark --time-to-accuracy "$recipe" --seeds "$seeds" \
        --json "$out/$name.json" "${overrides[@]}" "$@"
}
for recipe in mnist_99 mnist_99_4 mnist_99_5; do
    time_to_accuracy "$recipe" "$recipe"
done
time_to_accuracy mnist_99_ten_per_replay mnist_99 engine.capture=epoch # ten steps in one CUDA graph
for recipe in $recipes; do
    part "speed_$recipe" 90 python -m mnist_dist.benchmark --recipe "$recipe" --rounds "$rounds" --steps "$steps" \
        --json "$out/speed_$recipe.json" --markdown "$out/report.md" "${overrides[@]}"
done
part doctor 30 python -m mnist_dist.doctor --run-dir "$out" --json "$out/doctor.json"
figures=()
for file in "$out"/speed_*.json "$out"/inference_*.json; do
    [ -f "$file" ] && figures+=("$file")
done
if [ "${#figures[@]}" = 0 ]; then
    echo "floors: not checked, because no part has measured a speed" | tee -a "$out/summary.txt"
else
    part floors 20 python -m mnist_dist.benchmark --floors "${figures[@]}"
    [ -f "$out/floors.log" ] && cat "$out/floors.log"
fi

echo "$failed part(s) failed; the results are in $out ($SECONDS s)" | tee -a "$out/summary.txt"
[ "$failed" = 0 ]
