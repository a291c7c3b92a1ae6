#!/usr/bin/env bash
# Everything a GPU session needs, in one command: build, prove, measure.
#   bash benchmarks/gpu.sh OUT [STEP...]     steps: build tests benchmarks tune; the first three without any
# OUT gets <device>.json, summary.txt and logs.txt. A failing step does not stop the next: what did
# work is worth having. The exit code is the number of failures. Nothing is downloaded.
# Tests are compiled far longer than they run, so their files share the GPU, JOBS at once; benchmarks have
# it alone. LIMIT is the most seconds for one file.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bash benchmarks/gpu.sh OUT [build|tests|benchmarks|tune]...}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
export LIMIT=${LIMIT:-280} PYTHONUNBUFFERED=1 out
jobs=${JOBS:-$(($(nproc) / 2 > 0 ? $(nproc) / 2 : 1))}

step() {  # step NAME COMMAND...
    local name=$1 start=$SECONDS log code
    log=$(mktemp)
    shift
    timeout "$LIMIT" "$@" >"$log" 2>&1
    code=$?
    {
        if [ "$code" -eq 0 ]; then
            echo "ok      $name ($((SECONDS - start)) s): $(tail -n 1 "$log")"
        else
            echo "FAILED  $name ($((SECONDS - start)) s)"
            tail -n 25 "$log" | sed 's/^/        /'
        fi
    } | tee -a "$out/summary.txt"
    {
        echo "== $name"
        cat "$log"
    } >>"$out/logs.txt"
    grep -hE '^  .*( ms |target)' "$log"
    rm "$log"
    return "$code"
}

prove() {  # prove FILE
    # A file without a GPU test ends with 5.
    step "$1" bash -c 'python3 -m pytest -m gpu "$1" -q --durations=5 -p no:cacheprovider; code=$?; exit $((code == 5 ? 0 : code))' _ "$1"
}
export -f step prove

build() {
    step build env PYEFF_BUILD_CUDA=1 python3 -m pip install --no-build-isolation --no-deps -e .
    step info python3 -c 'import pyeff; print(pyeff.info())'
}

tests() {
    # Only what has GPU tests: the rest needs packages that a GPU machine may lack.
    find tests/ops tests/optim tests/observation tests/memory tests/test_info.py -name 'test_*.py' -print0 |
        xargs -0 -r -n 1 -P "$jobs" bash -c 'prove "$0"'
}

benchmarks() {
    local file
    for file in benchmarks/bench_*.py; do
        step "$file" python3 -m pytest "$file" --benchmark-only -q -s -p no:cacheprovider --keep-results="$out"
    done
}

tune() {
    step tune python3 benchmarks/tune_linear_grad.py "$out/tune.json"
    local head_size
    for head_size in 64 128; do
        step "tune attention $head_size" python3 benchmarks/tune_attention.py "$head_size" --out "$out/tune_attention_$head_size.json"
    done
}

: >"$out/summary.txt"
python3 -c 'import torch; print(torch.cuda.get_device_name(0))' | tee "$out/device.txt" || exit 1
for each in "${@:-build tests benchmarks}"; do
    for one in $each; do
        case $one in
            build | tests | benchmarks | tune) "$one" ;;
            *) echo "no step $one: build, tests, benchmarks or tune" && exit 2 ;;
        esac
    done
done
cat "$out/summary.txt"
exit "$(grep -c '^FAILED' "$out/summary.txt")"
