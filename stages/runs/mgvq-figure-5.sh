#!/usr/bin/env bash
# MGVQ, Figure 5: reconstructions of MGVQ-G4 from its first 1, 2, 3 and 4 groups, beside the originals, for the image files
# in FILES (separated by spaces).
: "${FILES:?set FILES to the image files to reconstruct}"
PROTOCOL=cleanfid-matched
. "$(dirname "$0")/row.sh"
two_phases mgvq-f16-g4 mgvq-f16-g4
read -ra files <<< "$FILES"
$RUN reconstruct "${files[@]}" --tokenizer "$OUT/mgvq-f16-g4" --groups 1,2,3,4 --out "$OUT/mgvq-figure-5"
