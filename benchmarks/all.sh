#!/usr/bin/env bash
# Every benchmark in one go, within an hour on two idle cores: with fewer seeds and cases than the pages' own figures where
# those take longer. Usage: benchmarks/all.sh IMAGES, a folder of train|test/<class>/*. Results: benchmarks/results/all.
set -euo pipefail
images=${1:?usage: benchmarks/all.sh IMAGES}
cd "$(dirname "$0")/.."
export BENCHMARK_RESULTS=benchmarks/results/all
mkdir -p "$BENCHMARK_RESULTS"
python=${PYTHON:-python}

failed=
run() {
    echo "== $*"
    local began=$SECONDS
    "$python" "benchmarks/$1.py" "${@:2}" || failed="$failed $1"
    echo "== $1: $((SECONDS - began)) s, $SECONDS s in all"
}

run round_cost
run overhead --images "$images" --repeat 1
run churn
run scale
run xray --seeds 5
run secure masking large secagg programs --images "$images" --seeds 0
run engines --images "$images" --repeat 1
run private --images "$images" --seeds 0 --repeat 1 --cases 0
run accuracy --images "$images" --seeds 0 --repeat 1 --cases 2
run repeats --images "$images" --seeds 0 --most 0 2
run wire --images "$images" --seeds 0
run async --images "$images" --seeds 0 --cases "equal speeds"
run examples --seeds 3
run memory --sizes 45
run record
run steps --images "$images" --seeds 1 --cases 1
if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
