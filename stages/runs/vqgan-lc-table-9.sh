#!/usr/bin/env bash
# VQGAN-LC, Table 9: without the projector, with a codebook that learns, and VQGAN-LC as published: a projector and a
# frozen codebook.
PROTOCOL=cleanfid-rawval
. "$(dirname "$0")/row.sh"
codebook 100000 100000
lc=(vqgan-lc-f16-100k --codebook "$OUT/codebook-100000")
# without a projector a code is a feature of 768 channels; the released code then normalizes the latents
row no-projector "${lc[@]}" --set model.quantizer.projector=none --set model.quantizer.code_dim=768 --set model.quantizer.normalize_latent=true
row tuned-codebook "${lc[@]}" --set model.quantizer.tune_codebook=true
row lc-100000 "${lc[@]}"
table vqgan-lc-table-9
