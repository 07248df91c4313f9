#!/usr/bin/env bash
# MGVQ, Figure 5: reconstructions of MGVQ-G4 from its first 1, 2, 3 and 4 groups, beside the originals: the first 8 images
# of EVAL (NUMBER for another number).
PROTOCOL=cleanfid-matched
. "$(dirname "$0")/row.sh"
two_phases mgvq-f16-g4 mgvq-f16-g4
each --images "$EVAL"
$RUN reconstruct "${EACH[@]}" --tokenizer "$OUT/mgvq-f16-g4" --groups 1,2,3,4 --limit "${NUMBER:-8}" \
    --out "$OUT/mgvq-figure-5"
