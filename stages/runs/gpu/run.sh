#!/bin/bash
# make gpu: everything that needs a GPU, in two halves of less than 9 minutes each. No network is used.
#
#   OUT      folder of the results (default: gpu-results)
#   PYTHON   Python with vqpipe's dependencies (default: python3). Wheels of those that it lacks: see gather.sh
#   ROUNDS   rounds of the measurements (default: 3)
#   HALF     tests or bench, for machines that are lent for 10 minutes (default: both)
#   DRY=1    run the same at small sizes on the CPU, where there is no GPU
set -euo pipefail
cd "$(dirname "$0")/../../.."
OUT=${OUT:-gpu-results} PYTHON=${PYTHON:-python3} HALF=${HALF:-both} DRY=${DRY:-} LIMIT=535
WHEELS=$PWD/gpu-wheels
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" DRY

no_gpu() {
    echo "no GPU: $1 (DRY=1 runs the same at small sizes on the CPU)" >&2
    exit 1
}
if [ -n "$DRY" ]; then
    ROUNDS=${ROUNDS:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # threads would wait for each other at these sizes
    export OMP_NUM_THREADS
else
    ROUNDS=${ROUNDS:-3}
    "$PYTHON" -c 'import torch' 2>/dev/null || no_gpu "$PYTHON has no PyTorch"
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || no_gpu "PyTorch finds none"
fi
if [ -d "$WHEELS" ]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade \
        --target "$WHEELS/installed" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$WHEELS/installed"
fi
mkdir -p "$OUT"
failed=0
if [ "$HALF" != bench ]; then
    echo "== half 1: tests"
    # The versions there are others than ours: their warnings are not errors.
    timeout $LIMIT "$PYTHON" -m pytest -m gpu -W default --durations=10 tests/gpu 2>&1 | tee "$OUT/tests.txt" || failed=1
fi
if [ "$HALF" != tests ]; then
    echo "== half 2: measurements beside the estimates"
    timeout $LIMIT "$PYTHON" -m stages bench --gpu ${DRY:+--quick} --rounds "$ROUNDS" --out "$OUT/bench" || failed=1
fi
exit $failed
