#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of a few minutes: bash benchmarks/gpu.sh [OUT [STEP...]]
#
# It uses the Python environment it is started in (PYTHON names another), installs nothing, needs no network and leaves
# the card's settings alone. OUT (build/gpu) gets the logs, the figures and a plot; STEPs are those of `all` below.
set -uo pipefail # but not -e: a step that fails does not stop those after it

all=(build representative test sanitize emulator bench profile)
python=${PYTHON:-python3}
out=${1:-${OUT:-build/gpu}}
shift $(($# > 0))
chosen=" ${*:-${all[*]}} "
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
for name in $chosen; do
    [[ " ${all[*]} " == *" $name "* ]] || { echo "gpu.sh: $name is not one of: ${all[*]}" >&2; exit 2; }
done

PATH=$PATH:/usr/local/cuda/bin # where a toolkit's tools are, if nobody has said so
export PYTHONUNBUFFERED=1
# Processes that share the tests must collect the same ones; the seed repeats a failure.
export PYTHONHASHSEED=0 FUSEDLOSS_TEST_SEED=${FUSEDLOSS_TEST_SEED:-$RANDOM}
rows=$(mktemp) # of the summary: outcome, seconds, step, the last line that it printed
trap 'rm -f "$rows"' EXIT

wanted() { [[ $chosen == *" $1 "* ]]; }

# step LOG NAME SECONDS COMMAND...: run within that time and note what came of it
step() {
    local log=$out/$1 name=$2 limit=$3 start=$SECONDS outcome status
    shift 3
    printf '\n== %s: %s\n' "$name" "$*" >>"$log"
    timeout -k 20 "$limit" "$@" >>"$log" 2>&1 </dev/null
    status=$?
    case $status in
    0) outcome=passed ;;
    124 | 137) outcome="ended at ${limit}s" ;;
    *) outcome="failed ($status)" ;;
    esac
    printf '%-14s %4ss  %-15s %s\n' "$outcome" $((SECONDS - start)) "$name" "$(tail -n 1 "$log" | cut -c 1-100)" |
        tee -a "$rows"
}

skip() { printf '%-14s %4ss  %-15s %s\n' skipped 0 "$1" "$2" | tee -a "$rows"; }

sanitize() {
    command -v compute-sanitizer >/dev/null || { skip sanitize "there is no compute-sanitizer"; return; }
    local tool options
    for tool in memcheck initcheck racecheck synccheck; do
        options=(--tool "$tool" --error-exitcode 9 --print-limit 20)
        # torch asks the driver for what it may lack, and checks the answer: those are no errors.
        [[ $tool == memcheck ]] && options+=(--report-api-errors no)
        # Tensors in allocations of their own: in a block that they share, no access would be out of bounds.
        step sanitize.log "$tool" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=4 \
            compute-sanitizer "${options[@]}" "$python" -m benchmarks.representative
    done
}

run_tests() {
    local pytest=("$python" -m pytest -p benchmarks.leave_out -q -m gpu --durations 10) several=()
    "$python" -c 'import xdist' 2>/dev/null && several=(-n 8)
    # Its tensors fill much of the card: no other test runs beside it.
    step gpu.log test_large 100 "${pytest[@]}" tests/test_large.py
    step gpu.log test 200 env TORCHINDUCTOR_COMPILE_THREADS=4 OMP_NUM_THREADS=2 "${pytest[@]}" "${several[@]}" \
        --ignore tests/test_large.py --ignore tests/test_cuda_emulator.py tests
}

profile() {
    command -v ncu >/dev/null || { skip profile "there is no ncu"; return; }
    local metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    metrics+=,dram__bytes_read.sum,dram__bytes_write.sum,lts__t_sector_hit_rate.pct
    metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
    step profile.log profile 90 ncu --clock-control none --profile-from-start off --metrics "$metrics" \
        "$python" -m benchmarks.profiled
}

{
    date -u +%FT%TZ
    git log -1 --format='commit %h %s' 2>/dev/null
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory --format=csv,noheader
    "$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
    nvcc --version | tail -n 2
    echo "steps:$chosen seed: $FUSEDLOSS_TEST_SEED"
} 2>&1 | tee -a "$out/gpu.log"

# Without one, every test would be skipped, and so pass.
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
    { echo "gpu.sh: torch sees no GPU" >&2; exit 1; }

# For the architecture of the card that is here, which the build finds by itself.
wanted build && step gpu.log build 150 env -u TORCH_CUDA_ARCH_LIST FUSEDLOSS_CUDA=1 \
    "$python" setup.py build_ext --inplace
wanted representative && step gpu.log representative 60 \
    "$python" -m benchmarks.representative --json "$out/representative.json"
# What is judged by its results alone shares the machine; what is timed has it for itself.
wanted emulator && step emulator.log emulator 240 "$python" -m pytest -q tests/test_cuda_emulator.py &
wanted sanitize && sanitize &
wanted test && run_tests
wait
wanted bench && step bench.log bench 280 "$python" -m benchmarks --suite cuda \
    --json "$out/bench.json" --plot "$out/bench.png"
wanted profile && profile

printf '\n== summary\n' | tee -a "$out/gpu.log"
tee -a "$out/gpu.log" <"$rows"
! grep -qE '^(failed|ended)' "$rows"
