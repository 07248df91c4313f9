#!/usr/bin/env bash
# VQGAN-LC, Table 3 (FFHQ): IMAGES and EVAL are the training and validation faces. Faces have no classes.
PROTOCOL=cleanfid-rawval
. "$(dirname "$0")/row.sh"
FEATURES=ffhq codebook ffhq-100k 100000
schedule=(--steps 187500 --set train.warmup_steps=1172)
row ffhq-vqgan vqgan-f16-16k "${schedule[@]}"
row ffhq-fc vqgan-fc-f16-16k "${schedule[@]}"
row ffhq-ema vqgan-ema-f16-16k "${schedule[@]}"
row ffhq-lc vqgan-lc-ffhq-f16-100k --codebook "$OUT/codebook-ffhq-100k"
table vqgan-lc-table-3
