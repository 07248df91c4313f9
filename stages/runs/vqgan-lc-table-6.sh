#!/usr/bin/env bash
# VQGAN-LC, Table 6: the source of the 100,000 frozen codes.
. "$(dirname "$0")/row.sh"
row init-random vqgan-lc-f16-100k --set model.quantizer.codebook_init=uniform --set model.quantizer.feature_dim=8
codebook selected 100000 -- --select random
row init-selected vqgan-lc-f16-100k --codebook "$OUT/codebook-selected"
FEATURES=clip-rn50 codebook rn50 100000 --encoder timm:resnet50_clip.openai
row init-rn50 vqgan-lc-f16-100k --codebook "$OUT/codebook-rn50" --set model.quantizer.feature_dim=2048
FEATURES=clip-vit-b codebook vit-b 100000 --encoder open_clip:ViT-B-16/openai
row init-vit-b vqgan-lc-f16-100k --codebook "$OUT/codebook-vit-b" --set model.quantizer.feature_dim=512
codebook 100000 100000
row lc-100000 vqgan-lc-f16-100k --codebook "$OUT/codebook-100000"
table vqgan-lc-table-6
