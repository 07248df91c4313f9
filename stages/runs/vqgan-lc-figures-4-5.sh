#!/usr/bin/env bash
# VQGAN-LC, Figure 4 (active and inactive codes in the plane) for FC and EMA at three sizes and LC at 100,000, and Figure 5
# (every token replaced by a near code) on the images of 100 random classes of EVAL. CODES: the maximum number of codes to
# plot.
PROTOCOL=cleanfid-rawval
. "$(dirname "$0")/row.sh"
codebook 100000 100000
for k in 16384 50000 100000; do
    tokenizer fc-$k vqgan-fc-f16-16k --set model.quantizer.codebook_size=$k
    tokenizer ema-$k vqgan-ema-f16-16k --set model.quantizer.codebook_size=$k
done
tokenizer lc-100000 vqgan-lc-f16-100k --codebook "$OUT/codebook-100000"
for t in fc-16384 fc-50000 fc-100000 ema-16384 ema-50000 ema-100000 lc-100000; do
    measure figure-4-$t "$OUT/$t" --analyze embedding --embedding-codes "${CODES:-100000}"
done
table vqgan-lc-figure-4
REPORTS=()
for t in fc-16384 ema-16384 lc-100000; do
    measure figure-5-$t "$OUT/$t" --analyze replacement --random-classes 100
done
table vqgan-lc-figure-5
