#!/usr/bin/env bash
# VQGAN-LC, Table 8: a codebook of one dataset for a tokenizer of another. IMAGES, EVAL: ImageNet; FFHQ, FFHQ_EVAL: faces.
: "${FFHQ:?set FFHQ to the training faces}" "${FFHQ_EVAL:?set FFHQ_EVAL to the validation faces}"
PROTOCOL=cleanfid-rawval
. "$(dirname "$0")/row.sh"
codebook 100000 100000
FEATURES=ffhq FEATURE_IMAGES=$FFHQ codebook ffhq-100k 100000
row lc-100000 vqgan-lc-f16-100k --codebook "$OUT/codebook-100000"
row ffhq-to-imagenet vqgan-lc-f16-100k --codebook "$OUT/codebook-ffhq-100k"
table vqgan-lc-table-8-imagenet
IMAGES=$FFHQ EVAL=$FFHQ_EVAL REPORTS=()
row ffhq-lc vqgan-lc-ffhq-f16-100k --codebook "$OUT/codebook-ffhq-100k"
row imagenet-to-ffhq vqgan-lc-ffhq-f16-100k --codebook "$OUT/codebook-100000"
table vqgan-lc-table-8-ffhq
