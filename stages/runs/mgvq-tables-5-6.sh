#!/usr/bin/env bash
# MGVQ, Table 5 (sub-codebooks, nested masking) and Table 6 (its last row's report has the curve over the first k groups).
# All rows have the same budget: 40 epochs, then 10 of fine-tuning.
PROTOCOL=cleanfid-matched
. "$(dirname "$0")/row.sh"
two_phases mgvq-one-codebook mgvq-f16-g4 --set model.quantizer.num_groups=1 \
    --set model.quantizer.group.codebook_size=32768 --set model.quantizer.group.code_dim=32
two_phases mgvq-no-masking mgvq-f16-g4 --set model.quantizer.masking=off
two_phases mgvq-f16-g4 mgvq-f16-g4
table mgvq-tables-5-6
