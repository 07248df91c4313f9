#!/usr/bin/env bash
# MGVQ, Table 5 (sub-codebooks, nested masking) and Table 6 (its last row's report has the curve over the first k groups).
. "$(dirname "$0")/row.sh"
one=(--set model.quantizer.num_groups=1 --set model.quantizer.group.codebook_size=32768 --set model.quantizer.group.code_dim=32)
row mgvq-one-codebook mgvq-f16-g4 "${one[@]}"
row mgvq-no-masking mgvq-f16-g4 --set model.quantizer.masking=off
row mgvq-f16-g4-masked mgvq-f16-g4
row mgvq-f16-g4 mgvq-f16-g4-finetune --from "$OUT/mgvq-f16-g4-masked"
table mgvq-tables-5-6
