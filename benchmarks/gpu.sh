#!/usr/bin/env bash
# Run the checks and measurements that need a GPU, in short steps: bash benchmarks/gpu.sh [OUT [STEP...]]
#
# The script uses the current Python environment (PYTHON names another interpreter), installs nothing, needs no network
# and does not change the card's settings. It writes the logs, the figures and a plot to OUT (default: build/gpu). If a
# step is interrupted at its time limit, the results it has by then are kept. The STEPs and the groups of steps are
# listed below.
# Environment variables: BENCH_SECONDS=100 limits the step `bench`, and likewise for each step. SECONDS_IN_ALL=290
# limits the whole run; the later steps get the time that is left. FUSEDLOSS_COMMIT names the commit if there is no git.
# DEVICE=cpu runs the script itself on the CPU, at tiny sizes, to try it out.
set -uo pipefail # but not -e: the steps after a failed one still run

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

PATH=$PATH:/usr/local/cuda/bin # the toolkit's usual place, if it is not on the PATH yet
export PYTHONUNBUFFERED=1
# The parallel test processes must collect the same tests. A run with the printed seed reproduces a failure.
export PYTHONHASHSEED=0 FUSEDLOSS_TEST_SEED=${FUSEDLOSS_TEST_SEED:-$RANDOM}
rows=$(mktemp) # rows of the summary: outcome, seconds, step
trap 'rm -f "$rows"' EXIT

wanted() { [[ $chosen == *" $1 "* ]]; }

note() { printf '%-14s %4ss  %s\n' "$@" | tee -a "$rows"; }

# step NAME SECONDS COMMAND...: run the command with its output in OUT/NAME.log. A step that takes times also prints its
# stdout at once; the others print an excerpt at the end. At the time limit the command is interrupted (SIGINT), so that
# Python can still print and write its results.
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
    *check | profile) # the signal must reach the tool and the program that it runs
        timeout -k 20 "$limit" "$@" >"$log" 2>&1 </dev/null
        status=$?
        ;;
    *) # of the parallel test processes, only the first is interrupted, and prints the failures so far
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
    printf '== %s: %s%s\n' "$name" "$status" "$shown" # in one call, since steps that run at the same time print too
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

# Compute a loss on the device too, because a build may lack the code for this card.
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
    else # without TORCH_CUDA_ARCH_LIST the build detects the architecture of the card
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
    # Only the kernels that compute the loss and the gradient, not those that add up the partial sums.
    options+=(--kernel-name 'regex:^(forward_|gradients)' --log-file "$out/profile.csv" --force-overwrite)
    rm -f "$out/profile.csv"
    step profile "$limit" ncu "${options[@]}" "$python" -m benchmarks.profiled --seconds $((limit - 25))
}

sanitize() {
    local tool=$1 options=(--tool "$1" --error-exitcode 9 --print-limit 20)
    command -v compute-sanitizer >/dev/null || { skip "$tool" "there is no compute-sanitizer"; return; }
    # torch calls driver functions that may be missing, and checks the result. Such calls are not errors.
    [[ $tool == memcheck ]] && options+=(--report-api-errors no)
    # Each tensor gets an allocation of its own. If tensors shared a block, an access out of bounds could go unnoticed.
    step "$tool" 140 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=3 \
        compute-sanitizer "${options[@]}" "$python" -m benchmarks.representative --dtype bfloat16,float32
}

run_tests() {
    local several=() ignored=() name
    local pytest=("$python" -m pytest -p benchmarks.leave_out -q -m gpu -rf --tb line --maxfail 60)
    "$python" -c 'import xdist' 2>/dev/null && several=(-n 8)
    # These take the longest and test the kernels the least.
    local of_compiler=(tests/test_compile.py tests/test_compile_autograd.py tests/test_export.py tests/test_accuracy.py)
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
    # Without a GPU, the tests that need one are deselected, and none of them would run.
    "$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)
raise SystemExit(sys.argv[1] == "cuda" and not torch.cuda.is_available())' "$device" ||
        { echo "gpu.sh: torch sees no GPU"; return 1; }

    build
    local of_representative=() of_bench=()
    [[ $device == cpu ]] && of_representative=(--every 29) of_bench=(--no-compile)
    step representative 60 "$python" -m benchmarks.representative --device "$device" "${of_representative[@]}" \
        --json "$out/representative.json"

    # The timed steps run alone on the machine.
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
        # Runs alone, since its tensors fill much of the GPU's memory.
        step test_large 100 "$python" -m pytest -q -m gpu -rf --tb line tests/test_large.py
    fi
    printf '== summary\n'
    cat "$rows"
    ! grep -qE '^(failed|ended)' "$rows"
}

main 2>&1 | tee "$out/output.txt"
exit "${PIPESTATUS[0]}"
