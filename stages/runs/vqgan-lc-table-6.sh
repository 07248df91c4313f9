#!/usr/bin/env bash
# VQGAN-LC, Table 6: where the 100,000 frozen codes come from. The grids of ResNet-50 (7 x 7) and ViT-B/16 (14 x 14) do not
# divide by 4: their features are averaged adaptively to 4 x 4, as by torch's adaptive_avg_pool2d, which the paper's "an
# additional average pooling layer" allows. All codebooks are made before anything is trained.
PROTOCOL=cleanfid-rawval
. "$(dirname "$0")/row.sh"
FEATURES=clip-rn50 codebook rn50 100000 --encoder timm:resnet50_clip.openai --pool 4
FEATURES=clip-vit-b codebook vit-b 100000 --encoder open_clip:ViT-B-16/openai --pool 4
codebook selected 100000 -- --select random
codebook 100000 100000
row init-random vqgan-lc-f16-100k --set model.quantizer.codebook_init=uniform --set model.quantizer.feature_dim=8
row init-selected vqgan-lc-f16-100k --codebook "$OUT/codebook-selected"
row init-rn50 vqgan-lc-f16-100k --codebook "$OUT/codebook-rn50" --set model.quantizer.feature_dim=2048
row init-vit-b vqgan-lc-f16-100k --codebook "$OUT/codebook-vit-b" --set model.quantizer.feature_dim=512
row lc-100000 vqgan-lc-f16-100k --codebook "$OUT/codebook-100000"
table vqgan-lc-table-6
