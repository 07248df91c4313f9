#!/usr/bin/env bash
# VQGAN-LC, Table 1 (left half) and Table 2 (ImageNet): four quantizers from 1,024 to 100,000 codes at f16, VQGAN-LC at f8,
# and RQ-VAE. Table 1 has one size more (1,024) and leaves plain VQGAN out; both are the same runs. All codebooks are
# clustered in one way: see `codebook` in row.sh. RQ-VAE's rows are trained here by its preset's recipe.
PROTOCOL=cleanfid-rawval
. "$(dirname "$0")/row.sh"
for k in 1024 16384 50000 100000; do
    codebook "$k" "$k"
    [ "$k" -eq 1024 ] || row vqgan-$k vqgan-f16-16k --set model.quantizer.codebook_size=$k
    row fc-$k vqgan-fc-f16-16k --set model.quantizer.codebook_size=$k
    row ema-$k vqgan-ema-f16-16k --set model.quantizer.codebook_size=$k
    row lc-$k vqgan-lc-f16-100k --codebook "$OUT/codebook-$k" --set model.quantizer.codebook_size=$k
done
row lc-f8-100000 vqgan-lc-f8-100k --codebook "$OUT/codebook-100000"
for depth in 4 8 16; do
    row rqvae-$((64 * depth)) rqvae-f32-16k --set model.quantizer.depth=$depth
done
table vqgan-lc-tables-1-2
