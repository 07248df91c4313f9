#!/usr/bin/env bash
# VQGAN-LC, Table 1, right half: FID of an LDM on FC, EMA and LC from 1,024 to 100,000 codes. Tokenizers are those of
# vqgan-lc-tables-1-2.sh, reused if they are in OUT, otherwise trained.
PROTOCOLS="cleanfid-raw adm"
. "$(dirname "$0")/row.sh"
for k in 1024 16384 50000 100000; do
    codebook "$k" "$k"
    tokenizer fc-$k vqgan-fc-f16-16k --set model.quantizer.codebook_size=$k
    tokenizer ema-$k vqgan-ema-f16-16k --set model.quantizer.codebook_size=$k
    tokenizer lc-$k vqgan-lc-f16-100k --codebook "$OUT/codebook-$k" --set model.quantizer.codebook_size=$k
    for t in fc ema lc; do
        each --images "$IMAGES"
        $RUN train-generator --preset ldm-f16 "${EACH[@]}" --tokenizer "$OUT/$t-$k" --out "$OUT/ldm-f16-$t-$k"
        samples ldm-f16-$t-$k imagenet "$IMAGES"
    done
done
sample_table vqgan-lc-table-1-ldm
