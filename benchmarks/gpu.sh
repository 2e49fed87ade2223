#!/usr/bin/env bash
# What only a GPU can show, in short steps: bash benchmarks/gpu.sh [OUT [STEP...]]
#
# It uses the Python environment it is started in (PYTHON names another), installs nothing, needs no network and leaves
# the card's settings alone. OUT (build/gpu) gets the logs, the figures and a plot; what a step has found by the time it
# is cut off stands there too. STEPs are those of `all` below, or groups of them.
# In the environment: BENCH_SECONDS=100 limits the step `bench`, and so for each; SECONDS_IN_ALL=290 limits the run,
# whose later steps get what is left. FUSEDLOSS_COMMIT names the commit where there is no git. DEVICE=cpu tries the
# script itself out, at tiny sizes.
set -uo pipefail # but not -e: a step that fails does not stop those after it

all=(build representative kernels goals sweep profile bench
    memcheck racecheck initcheck synccheck test test_compiler test_large)
first=(build representative kernels goals sweep profile memcheck racecheck test)
second=(build representative kernels bench)
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
out=${1:-${OUT:-build/gpu}}
shift $(($# > 0))
chosen=" "
for name in "${@:-first}"; do
    case $name in
    all) chosen+="${all[*]} " ;;
    first) chosen+="${first[*]} " ;;
    second) chosen+="${second[*]} " ;;
    *)
        [[ " ${all[*]} " == *" $name "* ]] ||
            { echo "gpu.sh: $name is not one of: first second all ${all[*]}" >&2; exit 2; }
        chosen+="$name "
        ;;
    esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PATH=$PATH:/usr/local/cuda/bin # where a toolkit's tools are, if nobody has said so
export PYTHONUNBUFFERED=1
# Processes that share the tests must collect the same ones; the seed repeats a failure.
export PYTHONHASHSEED=0 FUSEDLOSS_TEST_SEED=${FUSEDLOSS_TEST_SEED:-$RANDOM}
rows=$(mktemp) # of the summary: outcome, seconds, step
trap 'rm -f "$rows"' EXIT

wanted() { [[ $chosen == *" $1 "* ]]; }

note() { printf '%-14s %4ss  %s\n' "$@" | tee -a "$rows"; }

# step NAME SECONDS COMMAND...: what it prints goes to OUT/NAME.log. Where times are taken, stdout is shown at once,
# else an excerpt at the end. Python prints and writes what it has when the step is interrupted at its limit.
step() {
    local name=$1 start=$SECONDS status log=$out/$1.log own=${1^^}_SECONDS
    local limit=${!own:-$2} left=$((${SECONDS_IN_ALL:-100000} - SECONDS))
    shift 2
    wanted "$name" || return 0
    ((left > 4)) || { note skipped 0 "$name: no time is left"; return; }
    ((limit < left)) || limit=$left
    case $name in
    kernels | goals | bench | sweep)
        echo "== $name"
        timeout --foreground -s INT -k 20 "$limit" "$@" 2>"$log" </dev/null | tee -a "$log"
        status=${PIPESTATUS[0]}
        ;;
    *check | profile) # the signal is for the tool and for what it watches
        timeout -k 20 "$limit" "$@" >"$log" 2>&1 </dev/null
        status=$?
        ;;
    *) # of processes that share the tests, only the first is interrupted, and prints the failures so far
        timeout --foreground -s INT -k 20 "$limit" "$@" >"$log" 2>&1 </dev/null
        status=$?
        ;;
    esac
    local shown
    shown=$(excerpt "$name" "$log" "$status" | cut -c 1-200)
    case $status in
    0) status=passed ;;
    124 | 137) status="ended at ${limit}s" ;;
    *) status="failed ($status)" ;;
    esac
    shown=${shown:+$'\n'"$shown"}
    printf '== %s: %s%s\n' "$name" "$status" "$shown" # in one piece, as others may print meanwhile
    note "$status" $((SECONDS - start)) "$name" >/dev/null
}

excerpt() {
    local name=$1 log=$2 status=$3
    case $name in
    representative) grep -E '^(wrong|failed at)' "$log" | head -n 20; tail -n 1 "$log" ;;
    profile) "$python" -m benchmarks.ncu "$out/profile.csv"; grep -hm 2 '==ERROR==' "$out/profile.csv" "$log" ;;
    *check)
        grep -A 5 -m 3 -E '^=+ (Invalid|Error|Warning|Race|Uninit|Barrier|Program hit)' "$log"
        grep 'SUMMARY' "$log" || tail -n 1 "$log"
        ;;
    test*) grep -E '^(FAILED|ERROR)' "$log" | head -n 25; tail -n 1 "$log" ;;
    kernels | goals | bench | sweep) ((status == 0 || status == 124)) || tail -n 3 "$log" ;;
    build) ((status == 0)) || grep -m 5 -i error "$log"; tail -n 1 "$log" ;;
    esac 2>/dev/null
}

skip() { wanted "$1" && note skipped 0 "$1: $2"; }

# A loss is computed on the device: a build may lack the code for this card.
prebuilt='
import sys, fusedloss, torch
from fusedloss import _backend, functional
assert _backend.prebuilt()
what = fusedloss.describe()
assert sys.argv[1] == "cpu" or "and CUDA" in what, what
functional.mse_loss(torch.zeros(1, device=sys.argv[1]), torch.ones(1, device=sys.argv[1])).item()
print(what)'

build() {
    if wanted build && "$python" -c "$prebuilt" "$device" >"$out/build.log" 2>&1; then
        note passed "$SECONDS" "build: $(tail -n 1 "$out/build.log" | cut -c 1-100)"
    else # for the architecture of the card that is here, which the build finds by itself
        step build 200 env -u TORCH_CUDA_ARCH_LIST FUSEDLOSS_CUDA=$([[ $device == cpu ]] && echo 0 || echo 1) \
            "$python" setup.py build_ext --inplace
    fi
}

profile() {
    wanted profile || return 0
    command -v ncu >/dev/null || { skip profile "there is no ncu"; return; }
    local options=(--clock-control none --profile-from-start off --csv --page raw --print-units base) name
    local limit=${PROFILE_SECONDS:-75}
    for name in SpeedOfLight LaunchStats Occupancy SchedulerStats WarpStateStats MemoryWorkloadAnalysis; do
        options+=(--section "$name")
    done
    # Those that do the work, and not the sums after them.
    options+=(--kernel-name 'regex:^(forward_|gradients)' --log-file "$out/profile.csv" --force-overwrite)
    rm -f "$out/profile.csv"
    step profile "$limit" ncu "${options[@]}" "$python" -m benchmarks.profiled --seconds $((limit - 25))
}

sanitize() {
    local tool=$1 options=(--tool "$1" --error-exitcode 9 --print-limit 20)
    command -v compute-sanitizer >/dev/null || { skip "$tool" "there is no compute-sanitizer"; return; }
    # torch asks the driver for what it may lack, and checks the answer: those are no errors.
    [[ $tool == memcheck ]] && options+=(--report-api-errors no)
    # Tensors in allocations of their own: in a block that they share, no access would be out of bounds.
    step "$tool" 140 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=3 \
        compute-sanitizer "${options[@]}" "$python" -m benchmarks.representative --dtype bfloat16,float32
}

run_tests() {
    local several=() ignored=() name
    local pytest=("$python" -m pytest -p benchmarks.leave_out -q -m gpu -rf --tb line --maxfail 60)
    "$python" -c 'import xdist' 2>/dev/null && several=(-n 8)
    # These take long and say least about the kernels.
    local of_compiler=(tests/test_compile.py tests/test_export.py tests/test_accuracy.py)
    for name in "${of_compiler[@]}" tests/test_large.py tests/test_cuda_emulator.py; do
        ignored+=(--ignore "$name")
    done
    step test 140 env OMP_NUM_THREADS=1 "${pytest[@]}" "${several[@]}" "${ignored[@]}" tests
    step test_compiler 200 env TORCHINDUCTOR_COMPILE_THREADS=2 OMP_NUM_THREADS=1 \
        "${pytest[@]}" "${several[@]}" "${of_compiler[@]}"
}

main() {
    local sampler tool
    date -u +%FT%TZ
    echo "commit $(git log -1 --format='%h %s' 2>/dev/null || echo "${FUSEDLOSS_COMMIT:-unknown}")"
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory \
        --format=csv,noheader 2>/dev/null
    echo "steps:$chosen seed: $FUSEDLOSS_TEST_SEED"
    # Without one, every test would be skipped, and so pass.
    "$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)
raise SystemExit(sys.argv[1] == "cuda" and not torch.cuda.is_available())' "$device" ||
        { echo "gpu.sh: torch sees no GPU"; return 1; }

    build
    local of_representative=() of_bench=()
    [[ $device == cpu ]] && of_representative=(--every 29) of_bench=(--no-compile)
    step representative 60 "$python" -m benchmarks.representative --device "$device" "${of_representative[@]}" \
        --json "$out/representative.json"

    # What is timed has the machine for itself.
    timeout 900 nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,temperature.gpu,power.draw \
        --format=csv,noheader -l 2 >>"$out/clocks.csv" 2>/dev/null &
    sampler=$!
    step kernels 45 "$python" -m benchmarks.kernels --device "$device" --records "$out/kernels.jsonl"
    for suite in goals bench; do
        step "$suite" $([[ $suite == goals ]] && echo 120 || echo 200) "$python" -m benchmarks \
            --suite "${suite/bench/cuda}" --device "$device" "${of_bench[@]}" \
            --records "$out/$suite.jsonl" --json "$out/$suite.json" --plot "$out/$suite.png"
    done
    step sweep 60 "$python" -m benchmarks.sweep --device "$device" --records "$out/sweep.jsonl"
    kill "$sampler" 2>/dev/null
    wait "$sampler" 2>/dev/null
    echo "clocks: $(awk -F ', ' 'NF > 3 { print $2, $3, $4 " C" }' "$out/clocks.csv" | sort | uniq -c | sort -rn |
        head -n 4 | tr -s ' \n' ' ')"

    if [[ $device == cpu ]]; then
        for name in profile memcheck racecheck initcheck synccheck test test_compiler test_large; do
            skip "$name" "it needs a GPU"
        done
    else
        profile
        for tool in memcheck racecheck initcheck synccheck; do sanitize "$tool" & done
        run_tests
        wait
        # Its tensors fill much of the card.
        step test_large 100 "$python" -m pytest -q -m gpu -rf --tb line tests/test_large.py
    fi
    printf '== summary\n'
    cat "$rows"
    ! grep -qE '^(failed|ended)' "$rows"
}

main 2>&1 | tee "$out/output.txt"
exit "${PIPESTATUS[0]}"
