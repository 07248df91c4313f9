#!/usr/bin/env bash
# VQGAN-LC, Table 7: 1,000 to 200,000 frozen codes, and one size beyond the paper.
PROTOCOL=cleanfid-rawval
. "$(dirname "$0")/row.sh"
for k in 1000 10000 50000 100000 200000; do
    codebook "$k" "$k"
    row lc-$k vqgan-lc-f16-100k --codebook "$OUT/codebook-$k" --set model.quantizer.codebook_size=$k
done
codebook 1000000 1000000
row lc-1000000 vqgan-lc-f16-1m --codebook "$OUT/codebook-1000000"
table vqgan-lc-table-7
