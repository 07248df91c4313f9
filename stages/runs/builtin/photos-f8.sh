#!/usr/bin/env bash
# The tokenizer inside the package, `builtin:photos-f8`: LC with 16,384 codes on the network of the preset `small`.
#
#   TRAIN   training photographs, any form of --images
#   EVAL    photographs to measure on
#   OUT     where artifacts go (default: photos-f8)
set -euo pipefail
: "${TRAIN:?set TRAIN to the training images}" "${EVAL:?set EVAL to the images to measure on}"
OUT=${OUT:-photos-f8}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$OUT"
vqpipe extract-features --images "$TRAIN" --preset small --out "$OUT/features"
vqpipe kmeans --features "$OUT/features" --preset small --k 16384 --set kmeans.iterations=8 --out "$OUT/codebook"
vqpipe train --preset small --images "$TRAIN" --codebook "$OUT/codebook" --out "$OUT/tokenizer" --steps "${STEPS:-3000}" \
    --precision fp32 --set data.max_scale=1.6
python "$HERE/pack.py" "$OUT/tokenizer" "$OUT/packed"
vqpipe eval --images "$EVAL" --tokenizer "$OUT/packed" --out "$OUT/report"
