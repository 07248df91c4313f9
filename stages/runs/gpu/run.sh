#!/bin/bash
# make gpu: everything that needs a GPU, in two halves of less than 9 minutes each. No network is used.
#
#   OUT      folder of the results (default: gpu-results)
#   PYTHON   Python with vqpipe's dependencies (default: python3). Wheels that it lacks: see gather.sh
#   HALF     tests or bench, for machines that are lent for 10 minutes (default: both)
#   DRY=1    run the same on the CPU at small sizes, where there is no GPU
set -euo pipefail
cd "$(dirname "$0")/../../.."
OUT=${OUT:-gpu-results} PYTHON=${PYTHON:-python3} HALF=${HALF:-both} DRY=${DRY:-} LIMIT=535
WHEELS=$PWD/stages/runs/gpu/wheels
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" DRY

if [ -d "$WHEELS" ]; then
    "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" --target "$WHEELS/installed" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$WHEELS/installed"
fi
if [ -z "$DRY" ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "no GPU: $PYTHON finds none (DRY=1 runs the same at small sizes on the CPU)" >&2
    exit 1
fi
mkdir -p "$OUT"
failed=0
if [ "$HALF" != bench ]; then
    echo "== half 1: tests"
    timeout $LIMIT "$PYTHON" -m pytest -m gpu tests/gpu -s 2>&1 | tee "$OUT/tests.txt" || failed=1
fi
if [ "$HALF" != tests ]; then
    echo "== half 2: measurements, beside the plan"
    timeout $LIMIT "$PYTHON" -m stages bench ${DRY:+--quick} --rounds "${ROUNDS:-3}" --device "$([ -n "$DRY" ] && echo cpu || echo cuda)" \
        --out "$OUT/bench" || failed=1
    timeout $LIMIT "$PYTHON" stages/runs/gpu/measured_steps.py "$OUT/plan.json" || failed=1
fi
exit $failed
