#!/usr/bin/env bash
# Everything a GPU session needs, in one command: build, prove, measure.
#   bash benchmarks/gpu.sh OUT
# OUT gets build.log, tests.log, benchmarks.log, <device>.json and summary.txt. A failing step does not stop the next:
# what did work is worth having. The exit code is the number of failed steps. Nothing is downloaded.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bash benchmarks/gpu.sh OUT}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
failed=0
summary="$out/summary.txt"
: >"$summary"

step() {  # step NAME LOG COMMAND...
    local name=$1 log=$2 start=$SECONDS
    shift 2
    if "$@" >"$out/$log" 2>&1; then
        echo "ok      $name ($((SECONDS - start)) s)" | tee -a "$summary"
    else
        echo "FAILED  $name ($((SECONDS - start)) s), see $log" | tee -a "$summary"
        tail -n 25 "$out/$log"
        failed=$((failed + 1))
    fi
}

export PYTHONUNBUFFERED=1
python3 -c 'import torch; print(torch.cuda.get_device_name(0))' | tee "$out/device.txt" || exit 1
step build build.log env PYEFF_BUILD_CUDA=1 python3 -m pip install --no-build-isolation --no-deps -e .
step info info.log python3 -c 'import pyeff; print(pyeff.info())'
# Only what has GPU tests: the rest needs packages that a GPU machine may lack.
step tests tests.log timeout 280 python3 -m pytest -m gpu tests/ops tests/optim tests/observation -q --durations=10 \
    -p no:cacheprovider
step benchmarks benchmarks.log timeout 280 python3 -m pytest benchmarks --benchmark-only -q -s -p no:cacheprovider \
    --keep-results="$out"
tail -n 3 "$out/tests.log"
tail -n 60 "$out/benchmarks.log"
cat "$summary"
exit "$failed"
