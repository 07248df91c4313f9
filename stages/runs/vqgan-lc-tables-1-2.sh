#!/usr/bin/env bash
# VQGAN-LC, Tables 1 and 2 (ImageNet): four quantizers from 1,024 to 100,000 codes at f16, and VQGAN-LC at f8.
# Table 1 also has 1,024 codes, and no plain VQGAN; the other runs are shared by both tables.
. "$(dirname "$0")/row.sh"
for k in 1024 16384 50000 100000; do
    # 100 centres per class make 100,000; sizes that the classes do not divide are clustered over all classes at once
    per_class=$([ $((k % 1000)) -eq 0 ] && echo true || echo false)
    codebook "$k" "$k" -- --set kmeans.per_class=$per_class
    [ "$k" -eq 1024 ] || row vqgan-$k vqgan-f16-16k --set model.quantizer.codebook_size=$k
    row fc-$k vqgan-fc-f16-16k --set model.quantizer.codebook_size=$k
    row ema-$k vqgan-ema-f16-16k --set model.quantizer.codebook_size=$k
    row lc-$k vqgan-lc-f16-100k --codebook "$OUT/codebook-$k" --set model.quantizer.codebook_size=$k
done
row lc-f8-100000 vqgan-lc-f8-100k --codebook "$OUT/codebook-100000"
table vqgan-lc-tables-1-2
